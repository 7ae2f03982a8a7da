"""BwdArguments: what a compiled backward pass is called with."""

from dataclasses import dataclass
from typing import Any

NUM_PARTS = 3  # 16-bit numbers whose sum is delta
PARTS = 8  # room for them in delta_parts, per query


@dataclass(frozen=True)
class BwdArguments:
    """All but the stream; a tuple in this order will do.

    What tells lengths is None but for ragged sequences, and is what it is in FwdArguments.  Packed
    tensors have a batch of 1, and the blocks of packed queries are those of RaggedSpan.first_block.
    """

    q: Any  # (b, s_q, h_q, d)
    k: Any  # (b, s_k, h_k, d)
    v: Any  # (b, s_k, h_k, dv)
    out: Any  # (b, s_q, h_q, dv)
    dout: Any  # (b, s_q, h_q, dv)
    lse: Any  # (b, h_q, s_q) fp32
    dlse: Any  # (b, h_q, s_q) fp32; (0, h_q, s_q): there is none
    dq: Any  # (b, s_q, h_q, d), if it is wanted; or None
    dk: Any  # (b, s_k, h_k, d), if they are wanted; or None
    dv: Any  # (b, s_k, h_k, dv); or None
    # Workspace, contiguous.
    row_stats: Any  # (b, h_q, m_blocks, 2 * tile_m) fp32: of the rows of a block lse, then delta
    delta_parts: Any  # (b, h_q, m_blocks, 8 * tile_m) bf16, as Prepare writes them; or None
    dq_sums: Any  # (b, h_q, m_blocks, tile_m * tile_d) fp32, beside dq
    dq_counters: Any  # (b, h_q, m_blocks, warpgroups) int32, if deterministic; or None
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    page_table: Any  # None
    tiles: Any  # room for the list of tiles, blocks of keys
    num_sequences: Any
    softmax_scale: Any  # Float32
    scale_log2: Any  # Float32: softmax_scale * log2(e), with softcap times 2 / softcap
    softcap_log2: Any  # Float32: softcap * log2(e); or None
    window_left: Any  # Int32
    window_right: Any  # Int32
    num_ctas: Any  # Int32, at most so many are launched

    cache_leftpad = None  # for what asks either pass


LENGTHS = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
    *("page_table", "tiles", "num_sequences"),
)
