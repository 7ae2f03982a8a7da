"""FwdArguments: what a compiled forward kernel is called with."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FwdArguments:
    """All but the stream; a tuple in this order will do. Scales are None but for FP8."""

    q: Any  # (b, s_q, h_q, d)
    k: Any  # (b, s_k, h_k, d)
    v: Any  # (b, s_k, h_k, dv)
    out: Any  # (b, s_q, h_q, dv)
    lse: Any  # (b, h_q, s_q) fp32
    q_scales: Any  # (b, h_q or h_k, blocks) fp32
    k_scales: Any  # (b, h_k, blocks) fp32
    v_scales: Any  # (b, h_k, blocks or dv) fp32
    v_shift: Any  # (b, h_k, dv) fp32
    scale_log2: Any  # Float32: softmax_scale * log2(e)
    window_left: Any  # Int32
    window_right: Any  # Int32
    num_ctas: Any  # Int32, at most so many are launched
