"""FlashAttention-3's functions, private ones that programs call included, computed by fa3."""

import torch

from fa3 import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

from . import (
    _C,  # noqa: F401 - registers the operators
    raw,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def get_scheduler_metadata(  # noqa: PLR0913
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """An empty int32 tensor: fa3 makes its schedule itself, and takes this one without effect."""
    return cache_seqlens.new_empty(0, dtype=torch.int32)


def _flash_attn_forward(  # noqa: PLR0913
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
    *,
    out=None,
    window_size=None,
):
    """out, lse and twice an empty tensor. Gradients flow, as through fa3's own functions.

    `out` and `window_size` are older names, which yunchang uses.
    """
    out_ = out if out_ is None else out_
    window_size_left, window_size_right = window_size or (window_size_left, window_size_right)
    # fmt: off
    return raw.forward(
        q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
        rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal,
        window_size_left, window_size_right, attention_chunk, softcap, rotary_interleaved,
        scheduler_metadata, num_splits, pack_gqa, sm_margin,
    )
    # fmt: on


def _flash_attn_backward(  # noqa: PLR0913
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
    *,
    causal=False,
    window_size=None,
):
    """Fills dq, dk and dv, where they are given. What it returns is empty.

    `causal` and `window_size` are older names, which yunchang uses.
    """
    is_causal = is_causal or causal
    window_size_left, window_size_right = window_size or (window_size_left, window_size_right)
    # fmt: off
    return raw.backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k,
        max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_size_left, window_size_right,
        softcap, deterministic, sm_margin,
    )[0]
    # fmt: on
