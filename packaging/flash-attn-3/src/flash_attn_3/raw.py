"""FlashAttention-3's raw operators as plain functions over fa3: order, names, results."""

import torch

import fa3


def forward(  # noqa: PLR0913
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    q_v=None,
    out=None,
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
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    is_rotary_interleaved=False,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """out and lse, as of fa3's functions, and twice an empty tensor for partial results."""
    options = {
        "qv": q_v,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "softmax_scale": softmax_scale,
        "causal": is_causal,
        "window_size": (window_size_left, window_size_right),
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
        "out": out,
    }
    of_cache = k_new, v_new, page_table, kv_batch_idx, leftpad_k, rotary_cos, cu_seqlens_k_new
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    if any(x is not None for x in of_cache):
        for name, x in (("cu_seqlens_k", cu_seqlens_k), ("seqused_q", seqused_q)):
            if x is not None:
                raise NotImplementedError(f"{name} is a tensor, expected None with a cache")
        found = fa3.flash_attn_with_kvcache(
            q,
            k,
            v,
            k_new,
            v_new,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_seqlens=seqused_k,
            cache_batch_idx=kv_batch_idx,
            cache_leftpad=leftpad_k,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            max_seqlen_q=max_seqlen_q,
            rotary_seqlens=seqlens_rotary,
            rotary_interleaved=is_rotary_interleaved,
            scheduler_metadata=scheduler_metadata,
            return_softmax_lse=True,
            **options,
        )
    elif any(x is not None for x in lengths):
        found = fa3.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_q,
            seqused_k,
            return_attn_probs=True,
            **options,
        )
    else:
        found = fa3.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    result, lse = found
    return result, lse, lse.new_empty(0), lse.new_empty(0)


def backward(  # noqa: PLR0913
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq=None,
    dk=None,
    dv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    """Fills dq, dk and dv, where they are given; returns five empty tensors."""
    *gradients, _ = torch.ops.fa3.backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        None,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        sm_margin,
        softcap,
        deterministic,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
    )
    for given, found in zip((dq, dk, dv), gradients, strict=True):
        if given is not None:
            given.copy_(found)
    return tuple(softmax_lse.new_empty(0) for _ in range(5))


def combine(out_partial, lse_partial, out=None, out_dtype=None):
    """out and lse of fa3.flash_attn_combine."""
    return fa3.flash_attn_combine(out_partial, lse_partial, out=out, out_dtype=out_dtype)


def scheduler_metadata(  # noqa: PLR0913
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads,
    num_heads_k,
    headdim,
    headdim_v,
    qkv_dtype,
    seqused_k,
    *others,
    **options,
):
    """An empty int32 tensor: fa3 makes its schedule itself."""
    return seqused_k.new_empty(0, dtype=torch.int32)
