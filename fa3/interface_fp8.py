"""The public functions that take 16-bit tensors and attend in FP8."""

import torch

from . import ops
from .attend import are_plain, attend, bounds_of, check_out, in_autocasts_dtype, options_of
from .call import hints, lengths
from .call.layout import check_tensors
from .call.lengths import EQUAL
from .call.options import bool_of
from .call.scales import Descales
from .quantize import quantize_fp8

# Options of quantize_fp8 that calls in FP8 have, too.
_SCALING = (
    "hadamard",
    "smooth_k",
    "smooth_v",
    "block_scales",
    "v_per_channel",
    "rows_per_block",
    "qk_dtype",
)


@hints.closed
def flash_attn_fp8_func(  # noqa: PLR0913 - one argument per option
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    *,
    hadamard=True,
    smooth_k=None,
    smooth_v=True,
    block_scales=True,
    v_per_channel=False,
    rows_per_block=128,
    qk_dtype=torch.float8_e4m3fn,
    sm_margin=0,
    return_attn_probs=False,
    out=None,
    softcap=0.0,
    learnable_sink=None,
    **unknown,
):
    """Attention of fp16 or bf16 tensors, computed in FP8: quantize_fp8, then flash_attn_func.

    q (batch, s_q, h_q, d), k (batch, s_k, h_k, d), v (batch, s_k, h_k, dv); head dims are multiples
    of 16 up to 256. The result, and `out`, have their dtype.
    hadamard, smooth_k, smooth_v, block_scales, v_per_channel, rows_per_block, qk_dtype: as in
        quantize_fp8. hadamard, on by default, needs a d that is a power of two. smooth_k moves all
        scores of a query alike, which only the lse notices, but for a softcap and a sink: it is on
        without them, and refused beside them.
    The other arguments: as in flash_attn_func. lse is that of q and k as given, before smooth_k.

    Raises:
        TypeError, ValueError: the message names the argument; nothing was launched or written.
        NotImplementedError: a tensor that requires grad or has a tangent of forward-mode AD, or a
            GPU without a kernel for the case.
    """
    if unknown:
        raise hints.unknown_argument(flash_attn_fp8_func, next(iter(unknown)))
    options = options_of(softmax_scale, causal, window_size, sm_margin, softcap)
    smooth_k = _smooth_k_of(smooth_k, options[-1], learnable_sink)
    scaling = hadamard, smooth_k, smooth_v, block_scales, v_per_channel, rows_per_block, qk_dtype
    return _attend_in_fp8(q, k, v, out, options, scaling, return_attn_probs, sink=learnable_sink)


@hints.closed
def flash_attn_varlen_fp8_func(  # noqa: PLR0913 - one argument per option
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    *,
    hadamard=True,
    smooth_k=None,
    smooth_v=True,
    block_scales=True,
    v_per_channel=False,
    rows_per_block=128,
    qk_dtype=torch.float8_e4m3fn,
    sm_margin=0,
    return_attn_probs=False,
    out=None,
    check_lengths=False,
    softcap=0.0,
    learnable_sink=None,
    **unknown,
):
    """flash_attn_fp8_func of sequences with lengths of their own, packed without padding.

    q (total_q, h_q, d), k (total_k, h_k, d), v (total_k, h_k, dv); either q, or k and v, may be
    dense. cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
    check_lengths, and which rows of the result are not written: as in flash_attn_varlen_func. Each
    sequence is quantised by itself, whatever stands beside it.

    The other arguments, and what is returned and raised: as in flash_attn_fp8_func; lse is
    (h_q, total_q), of dense q (batch, h_q, s_q).
    """
    if unknown:
        raise hints.unknown_argument(flash_attn_varlen_fp8_func, next(iter(unknown)))
    options = options_of(softmax_scale, causal, window_size, sm_margin, softcap)
    smooth_k = _smooth_k_of(smooth_k, options[-1], learnable_sink)
    scaling = hadamard, smooth_k, smooth_v, block_scales, v_per_channel, rows_per_block, qk_dtype
    given = lengths.given(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    more = given, *bounds_of(given, max_seqlen_q, max_seqlen_k, check_lengths)
    return _attend_in_fp8(q, k, v, out, options, scaling, return_attn_probs, *more, learnable_sink)


def _attend_in_fp8(  # noqa: PLR0913
    q,
    k,
    v,
    out,
    options,
    scaling,
    return_attn_probs,
    given=EQUAL,
    longest=(None, None),
    check_lengths=False,
    sink=None,
):
    """scaling: what _SCALING names."""
    return_attn_probs = bool_of("return_attn_probs", return_attn_probs)
    check_tensors(q=q, k=k, v=v, **lengths.named(given))
    if out is not None:
        check_out(out)
    if sink is not None:
        check_tensors(learnable_sink=sink)
    if torch.float32 in (q.dtype, k.dtype, v.dtype):
        q, k, v = in_autocasts_dtype(q, k, v)
    more = given, longest, check_lengths, sink
    if are_plain(q, k, v, None, given):
        ops.check(q, k, v, out, *more, *options)
    inputs = quantize_fp8(
        q, k, v, **dict(zip(_SCALING, scaling, strict=True)), **lengths.named(given)
    )
    descales = Descales(**inputs.scales)
    out, lse = attend(*inputs[:3], out, options, descales, q.dtype, False, *more)
    if not return_attn_probs:
        return out
    if inputs.lse_shift is not None:
        scale = q.shape[-1] ** -0.5 if options[0] is None else options[0]
        lse = torch.add(lse, inputs.lse_shift, alpha=scale)
    return out, lse


def _smooth_k_of(smooth_k, softcap, sink) -> bool:
    allowed = not softcap and sink is None
    if smooth_k is None:
        return allowed
    if bool_of("smooth_k", smooth_k) and not allowed:
        name, value = ("softcap", softcap) if sink is None else ("learnable_sink", "a tensor")
        raise ValueError(
            f"smooth_k is True but {name} is {value}, expected smooth_k=False: it moves all scores "
            "of a query, which then changes the result"
        )
    return smooth_k
