"""The public functions: FA3's names, order, defaults and meaning, and FP8 in one call."""

import torch
from torch import Tensor
from torch.nn import Parameter

from . import ops, scales
from .layout import check_tensors
from .problem import BYTE_DTYPES
from .quantize import quantize_fp8

# Tensor types whose memory a kernel can be given; others go through torch's dispatcher.
_PLAIN = {Tensor, Parameter}
_is_traced, _num_dispatch_modes = (
    torch.compiler.is_dynamo_compiling,
    torch._C._len_torch_dispatch_stack,
)

# Arguments of FA3 that wait for their feature, with the value that means "not used".
_NOT_YET = {
    "qv": None,
    "attention_chunk": 0,
    "softcap": 0.0,
    "num_splits": 1,
    "pack_gqa": None,
}


def flash_attn_func(  # noqa: PLR0913 - the signature is FA3's
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    out=None,
    v_shift=None,
    check_scales=False,
):
    """softmax(softmax_scale * q k^T) v in fp16, bf16 or FP8.

    q (batch, s_q, h_q, d), k (batch, s_k, h_k, d), v (batch, s_k, h_k, dv); h_q is a multiple of
    h_k, query head h reads key head h // (h_q // h_k). Head dims are multiples of 16 bytes up to
    256 elements: of 8 in fp16 and bf16, of 16 in FP8.
    Last dimensions are contiguous and tensors start at multiples of 16 bytes. Other strides are
    free; q, k or v is copied first if one of them is no multiple of 16 bytes, TMA's unit.

    causal: query i sees the keys j <= i + s_k - s_q (aligned to the bottom right).
    window_size: query i sees i + s_k - s_q - left <= j <= i + s_k - s_q + right; -1 is no bound;
    causal sets right to 0. softmax_scale: 1 / sqrt(d) by default.
    A query that sees no key gives zeros and an lse of -inf.
    sm_margin: number of SMs that the kernel leaves to others.
    deterministic: accepted; the forward pass always is.
    out: (batch, s_q, h_q, dv), receives the result instead of a new tensor.

    fp16, bf16: q, k, v and out have one dtype.
    FP8: q, k, v are torch.float8_e4m3fn; k and v may be torch.float8_e5m2, and q and k may both be
    torch.int8. The result is bf16, or what `out` is: bf16, fp16 or fp32.
    q_descale, k_descale, v_descale: scales of one-byte inputs, value = byte * descale. Each is fp32
    with any strides, in any of these shapes; None is 1. `fa3.quantize_fp8` makes them.

        q_descale   (batch, h_k)                    one for all queries that read a key head
                    (batch, h_q, ceil(s_q / 128))   [b, h, i // 128] for query i of query head h
        k_descale   (batch, h_k)                    one for all keys of a head
                    (batch, h_k, ceil(s_k / B))     [b, h, j // B] for key j; B is 64 or 128
        v_descale   as k_descale, each with a B of its own, or
                    (batch, h_k, 1, dv)             [b, h, 0, c] for channel c

    v_shift: (batch, h_k, dv) in fp32, with one-byte inputs: what all values of a channel lack,
        value = byte * v_descale + v_shift. None is 0. Softmax weights add up to 1, so it is added
        to the result, but not where a query sees no key: that stays 0. Any strides; it is copied
        first if the last is not 1, or others or its address are no multiples of 16 bytes.
    check_scales: wait for the device and refuse scales that are not finite and above 0, and a
        v_shift that is not finite.

    Returns out, or with return_attn_probs=True the pair out and lse (batch, h_q, s_q), fp32, the
    natural logarithm of each row's sum of exponentials.

    Raises:
        TypeError, ValueError: the message names the argument; nothing was launched or written
            (but for the comparisons of check_scales).
        NotImplementedError: an argument that is not supported yet, a tensor that requires grad, or
            a GPU without a kernel for the case.
    """
    if qv is not None or attention_chunk or softcap or num_splits not in (0, 1) or pack_gqa:
        _refuse(
            qv=qv,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
        )
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise _not_a_pair(window_size) from None
    plain = type(q) is type(k) is type(v) is Tensor or {type(q), type(k), type(v)} <= _PLAIN
    if not plain:
        check_tensors(q=q, k=k, v=v)
    if out is not None:
        _check_out(out)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _refuse_grad(q=q, k=k, v=v)
    if (
        q_descale is not None
        or k_descale is not None
        or v_descale is not None
        or v_shift is not None
        or q.dtype in BYTE_DTYPES
    ):
        descales = q_descale, k_descale, v_descale, v_shift
        options = softmax_scale, causal, left, right, sm_margin
        out, lse = _fp8(q, k, v, out, descales, options, check_scales)
    elif plain and not _is_watched():
        out, lse = ops.run(q, k, v, out, softmax_scale, causal, left, right, sm_margin)
    else:
        out, lse = _dispatched(q, k, v, out, softmax_scale, causal, left, right, sm_margin)
    return (out, lse) if return_attn_probs else out


def flash_attn_fp8_func(  # noqa: PLR0913 - one argument per option
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    *,
    hadamard=True,
    smooth_k=True,
    smooth_v=True,
    block_scales=True,
    v_per_channel=False,
    rows_per_block=128,
    qk_dtype=torch.float8_e4m3fn,
    sm_margin=0,
    return_attn_probs=False,
    out=None,
):
    """Attention of fp16 or bf16 tensors, computed in FP8: quantize_fp8, then flash_attn_func.

    q (batch, s_q, h_q, d), k (batch, s_k, h_k, d), v (batch, s_k, h_k, dv); head dims are multiples
    of 16 up to 256. The result, and `out`, have their dtype.
    hadamard, smooth_k, smooth_v, block_scales, v_per_channel, rows_per_block, qk_dtype: as in
        quantize_fp8. hadamard, on by default, needs a d that is a power of two.
    The other arguments: as in flash_attn_func. lse is that of q and k as given, before smooth_k.

    Raises:
        TypeError, ValueError: the message names the argument; nothing was launched or written.
        NotImplementedError: a tensor that requires grad, or a GPU without a kernel for the case.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise _not_a_pair(window_size) from None
    check_tensors(q=q, k=k, v=v)
    if out is not None:
        _check_out(out)
    if not _is_watched():
        ops.check(q, k, v, out, softmax_scale, causal, left, right, sm_margin)
    inputs = quantize_fp8(
        q,
        k,
        v,
        hadamard=hadamard,
        smooth_k=smooth_k,
        smooth_v=smooth_v,
        block_scales=block_scales,
        v_per_channel=v_per_channel,
        rows_per_block=rows_per_block,
        qk_dtype=qk_dtype,
    )
    if out is None and q.dtype != torch.bfloat16:
        out = q.new_empty(*q.shape[:3], v.shape[3])
    out, lse = flash_attn_func(
        inputs.q,
        inputs.k,
        inputs.v,
        softmax_scale,
        causal,
        q_descale=inputs.q_descale,
        k_descale=inputs.k_descale,
        v_descale=inputs.v_descale,
        v_shift=inputs.v_shift,
        window_size=window_size,
        sm_margin=sm_margin,
        return_attn_probs=True,
        out=out,
    )
    if not return_attn_probs:
        return out
    if smooth_k:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        lse = torch.add(lse, inputs.lse_shift, alpha=scale)
    return out, lse


def _fp8(q, k, v, out, descales, options, check_scales):
    """Attention of one-byte inputs, or the error that says what is not right."""
    given = [x for x in descales if x is not None]
    plain = {type(x) for x in (q, k, v, *given)} <= _PLAIN
    if not plain:
        check_tensors(**scales.named(descales))
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        _refuse_grad(**scales.named(descales))
    if not isinstance(check_scales, bool):
        raise TypeError(f"check_scales is {check_scales!r}, expected True or False")
    if plain and not _is_watched():
        return ops.run_fp8(q, k, v, out, descales, *options, check_scales=check_scales)
    if out is None:
        return torch.ops.fa3.forward_fp8(q, k, v, *descales, *options, check_scales)
    return out, torch.ops.fa3.forward_fp8_out(q, k, v, out, *descales, *options, check_scales)


def _is_watched() -> bool:
    """Under torch.compile, or in a mode that sees operators: fake tensors, counters of FLOPs."""
    return _is_traced() or _num_dispatch_modes() > 0


def _dispatched(q, k, v, out, *options):
    if out is None:
        return torch.ops.fa3.forward(q, k, v, *options)
    return out, torch.ops.fa3.forward_out(q, k, v, out, *options)


def _not_a_pair(window_size) -> TypeError:
    return TypeError(f"window_size is {window_size!r}, expected a pair (left, right)")


def _check_out(out) -> None:
    check_tensors(out=out)
    if out.requires_grad:
        raise ValueError("out has requires_grad=True, expected False")


def _refuse(**arguments) -> None:
    for name, value in arguments.items():
        if isinstance(value, Tensor) or (value not in (None, 0) and value != _NOT_YET[name]):
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(
                f"{name} is {shown}: only {_NOT_YET[name]!r} is supported so far"
            )


def _refuse_grad(**tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise NotImplementedError(
                f"{name} has requires_grad=True, but there is no backward pass yet: "
                "call within torch.no_grad(), or detach it"
            )
