"""FwdArguments: what a compiled forward kernel is called with."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FwdArguments:
    """All but the stream; a tuple in this order will do.

    Scales are None but for FP8, sinks where there are none, and what tells lengths but for ragged
    sequences.  The batch of a packed tensor is 1, and its rows are those of all sequences; that of
    pages is how many there are, and their rows are those of one page.
    """

    q: Any  # (b, s_q, h_q, d)
    k: Any  # (b, s_k, h_k, d)
    v: Any  # (b, s_k, h_k, dv)
    out: Any  # (b, s_q, h_q, dv)
    lse: Any  # (b, h_q, s_q) fp32
    q_scales: Any  # (b, h_q or h_k, blocks) fp32
    k_scales: Any  # (b, h_k, blocks) fp32
    v_scales: Any  # (b, h_k, blocks or dv) fp32
    v_shift: Any  # (b, h_k, dv) fp32
    sinks: Any  # (b, h_q) fp32
    cu_seqlens_q: Any  # (b + 1,) int32: rows of packed q before each sequence; (0,): q is dense
    cu_seqlens_k: Any  # the same of k and v
    seqused_q: Any  # (b,) int32: how many rows of a sequence count; (0,): all
    seqused_k: Any
    page_table: Any  # (b, pages) int32: which entries of k and v a sequence's keys are in; or None
    # int32: room for the list of a ragged call's tiles (scheduler.TileList); of a dense call the
    # counter of a dynamic schedule, 0, or None
    tiles: Any
    num_sequences: Any  # Int32
    scale_log2: Any  # Float32: softmax_scale * log2(e), with softcap times 2 / softcap
    softcap_log2: Any  # Float32: softcap * log2(e)
    window_left: Any  # Int32
    window_right: Any  # Int32
    num_ctas: Any  # Int32, at most so many are launched
    num_splits: Any = None  # Int32, where Signature.is_split: heads of out and lse per head of q
    rows_per_query: Any = None  # Int32, where Signature.packs_heads
    is_listed: Any = None  # Int32, of ragged sequences: 1 if `tiles` holds the list already
    # (b,) int32, beside page_table: rows of a sequence ahead of its first key; (0,): none
    cache_leftpad: Any = None
