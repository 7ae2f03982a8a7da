"""BwdArguments: what a compiled backward pass is called with."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BwdArguments:
    """All but the stream; a tuple in this order will do."""

    q: Any  # (b, s_q, h_q, d)
    k: Any  # (b, s_k, h_k, d)
    v: Any  # (b, s_k, h_k, dv)
    out: Any  # (b, s_q, h_q, dv)
    dout: Any  # (b, s_q, h_q, dv)
    lse: Any  # (b, h_q, s_q) fp32
    dlse: Any  # (b, h_q, s_q) fp32; (0, h_q, s_q): there is none
    dq: Any  # (b, s_q, h_q, d)
    dk: Any  # (b, s_k, h_k, d)
    dv: Any  # (b, s_k, h_k, dv)
    row_stats: Any  # (b, h_q, m_blocks, 2 * tile_m) fp32: of the rows of a block lse, then delta
    dq_sums: Any  # (b, h_q, m_blocks, tile_m * tile_d) fp32
    dq_counters: Any  # (b, h_q, m_blocks, warpgroups) int32, if deterministic; or None
    softmax_scale: Any  # Float32
    scale_log2: Any  # Float32: softmax_scale * log2(e)
    window_left: Any  # Int32
    window_right: Any  # Int32
    num_ctas: Any  # Int32, at most so many are launched
