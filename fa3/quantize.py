"""16-bit q, k and v -> the one-byte tensors and scales that attention in FP8 or INT8 takes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, jit, quantize_reference
from .kernels.quantize_signature import CHUNK, QuantizeConfig, QuantizeSignature
from .layout import (
    ALIGNMENT,
    Layout,
    check_last_stride,
    check_tensors,
    odd_dimension,
    tma_strides,
)
from .problem import BYTE_DTYPES, DTYPES, Options, Problem
from .scales import Q_BLOCK, num_blocks

KERNEL = "fa3.kernels.quantize:Quantize"


class Fp8Inputs(NamedTuple):
    """What flash_attn_func takes; shapes in quantize_fp8. A descale multiplies the bytes."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor
    lse_shift: Tensor | None = None


class _Options(NamedTuple):
    hadamard: bool
    smooth_k: bool
    block_scales: bool
    v_per_channel: bool
    rows_per_block: int
    qk_dtype: torch.dtype
    v_dtype: torch.dtype


def quantize_fp8(  # noqa: PLR0913 - one argument per option
    q,
    k,
    v,
    *,
    hadamard=False,
    smooth_k=False,
    block_scales=True,
    v_per_channel=False,
    rows_per_block=128,
    qk_dtype=torch.float8_e4m3fn,
    v_dtype=torch.float8_e4m3fn,
):
    """Quantise q (b, s_q, h_q, d), k (b, s_k, h_k, d) and v (b, s_k, h_k, dv) in bf16 or fp16.

    Head dims are multiples of 16 up to 256. Last dimensions are contiguous; other strides are free,
    and a tensor is copied first where one of them or its address is no multiple of 16 bytes.

    hadamard: rotate the rows of q and k, which leaves q k^T as it is and spreads outliers over all
        channels: a diagonal of fixed signs, then the Walsh-Hadamard transform, by 1 / sqrt(d).
        d must be a power of two.
    smooth_k: subtract from k its mean over s_k, which softmax does not see, but its LSE does.
    block_scales: one scale per block of rows; else per batch entry and key head, as FA3 takes them.
    v_per_channel: v has a scale per channel instead, whatever block_scales says.
    rows_per_block: keys per scale of k and v, 64 or 128; a scale of q has 128 rows.
    qk_dtype: of q and k, torch.float8_e4m3fn or torch.int8.
    v_dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns Fp8Inputs. q, k and v are contiguous and have the shapes given; value = byte * descale,
    with descales in fp32, contiguous:

        descale     block_scales                           else
        q_descale   (b, h_q, ceil(s_q / 128))              (b, h_k)
        k_descale   (b, h_k, ceil(s_k / rows_per_block))   (b, h_k)
        v_descale   (b, h_k, ceil(s_k / rows_per_block))   (b, h_k)   v_per_channel: (b, h_k, 1, dv)

    lse_shift is None, or with smooth_k (b, h_q, s_q) in fp32: the products of the rows of q with
    the mean of k. Add softmax_scale * lse_shift to the LSE to get that of the original k.

    A descale is the largest finite magnitude under it over the largest code (e4m3 448, e5m2 57344,
    int8 127), at least 2^-126, and 1 where all is zero. Codes are rounded to nearest even and
    saturate. inf and NaN become NaN and change nothing else, except that hadamard spreads them over
    their row and smooth_k does not smooth the channels of k whose mean is not finite. int8 has no
    NaN: there they become 0.

    Raises:
        TypeError, ValueError: the message names the argument; nothing was launched.
        NotImplementedError: a tensor that requires grad, or a GPU that is no Hopper.
    """
    check_tensors(q=q, k=k, v=v)
    options = _Options(
        hadamard, smooth_k, block_scales, v_per_channel, rows_per_block, qk_dtype, v_dtype
    )
    _check_options(options)
    _check_grad(q=q, k=k, v=v)
    watched = torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0
    *inputs, lse_shift = (torch.ops.fa3.quantize_fp8 if watched else _run)(q, k, v, *options)
    return Fp8Inputs(*inputs, lse_shift if smooth_k else None)


def _run(q, k, v, *options):
    """As the operator fa3::quantize_fp8: without smooth_k, lse_shift is empty."""
    options = _Options(*options)
    _check_layouts(Layout.of(q), Layout.of(k), Layout.of(v), options)
    q, k, v = (_aligned(x) for x in (q, k, v))
    k_mean = lse_shift = None
    if options.smooth_k:
        # Any row can be subtracted: where the mean is not finite, leave the channel as it is.
        k_mean = k.mean(dim=1, dtype=torch.float32).nan_to_num(0.0, 0.0, 0.0)
        k_mean = k_mean.contiguous()  # (b, h_k, d)
        lse_shift = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    rows, form = options.rows_per_block, "block" if options.block_scales else "head"
    qk = functools.partial(_quantize, dtype=options.qk_dtype, form=form, hadamard=options.hadamard)
    q, q_descale = qk(q, rows=Q_BLOCK, h_k=k.shape[2], mean=k_mean, dot=lse_shift)
    k, k_descale = qk(k, rows=rows, h_k=k.shape[2], mean=k_mean)
    v_form = "channel" if options.v_per_channel else form
    v, v_descale = _quantize(v, dtype=options.v_dtype, form=v_form, rows=rows, h_k=v.shape[2])
    if lse_shift is None:
        lse_shift = q.new_empty(0, dtype=torch.float32)
    return q, k, v, q_descale, k_descale, v_descale, lse_shift


def _quantize(x, *, dtype, form, rows, h_k, hadamard=False, mean=None, dot=None):  # noqa: PLR0913
    """Bytes and descales of one tensor; with `dot` the mean is only multiplied, not subtracted."""
    b, s, h, d = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    signature = functools.partial(
        QuantizeSignature,
        DTYPES[x.dtype],
        BYTE_DTYPES[dtype],
        d,
        rows,
        hadamard=hadamard,
        subtract_mean=mean is not None and dot is None,
        dot_with_mean=dot is not None,
    )
    kernel = functools.partial(_kernel, x)
    if form == "block":
        descale = x.new_empty(b, h, num_blocks(s, rows), dtype=torch.float32)
        kernel(signature())(x, y.view(torch.uint8), descale, mean, dot)
        return y, descale
    peaks = x.new_zeros(b, h, max(1, num_blocks(s, rows)), d, dtype=torch.float32)
    amax = signature(scales="amax", dot_with_mean=False)
    kernel(amax)(x, None, peaks, mean if amax.has_mean else None, None)
    peaks = peaks.amax(dim=2) if form == "channel" else peaks.view(b, h_k, -1).amax(dim=-1)
    descale = quantize_reference.descale_of(peaks, BYTE_DTYPES[dtype])
    factors = 1 / descale
    if form == "head":
        factors = factors.repeat_interleave(h // h_k, dim=1)[..., None].repeat(1, 1, d)
    kernel(signature(scales="given"))(x, y.view(torch.uint8), factors, mean, dot)
    return y, descale[:, :, None] if form == "channel" else descale


def _kernel(x: Tensor, signature: QuantizeSignature) -> Callable:
    """The function run(x, y, scales, mean, dot) for tensors like x."""
    if x.numel() == 0 or x.device.type == "meta":
        return _do_nothing
    target = dispatch.target_of(x.device)
    if target.kind == "reference":
        return quantize_reference.bind(signature)
    if target.capability[0] != 9:
        major, minor = target.capability
        raise NotImplementedError(
            f"quantize_fp8 needs compute capability 9.x, {target.name} has {major}.{minor}"
        )
    return jit.compile(KERNEL, signature, QuantizeConfig(), target.kind)


def _do_nothing(*arguments):
    pass


def _aligned(x: Tensor) -> Tensor:
    """x, copied if the kernel cannot read it in steps of 16 bytes."""
    layout = Layout.of(x)
    if odd_dimension(layout) is not None or (
        x.device.type != "meta" and x.data_ptr() % ALIGNMENT != 0
    ):
        return x.clone(memory_format=torch.contiguous_format)
    strides = tma_strides(layout)
    return x if strides is None else x.as_strided(x.shape, strides)


def _check_options(options: _Options) -> None:
    for name in ("hadamard", "smooth_k", "block_scales", "v_per_channel"):
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected True or False")
    if options.rows_per_block not in (64, 128):
        raise ValueError(f"rows_per_block is {options.rows_per_block!r}, expected 64 or 128")
    for name, allowed in (
        ("qk_dtype", (torch.float8_e4m3fn, torch.int8)),
        ("v_dtype", (torch.float8_e4m3fn, torch.float8_e5m2)),
    ):
        value = getattr(options, name)
        if value not in allowed:
            raise TypeError(f"{name} is {value!r}, expected {allowed[0]} or {allowed[1]}")


def _check_layouts(q: Layout, k: Layout, v: Layout, options: _Options) -> None:
    """Raises TypeError or ValueError; nothing has been launched."""
    if q.dtype not in DTYPES:
        raise TypeError(f"q has dtype {q.dtype}, expected torch.float16 or torch.bfloat16")
    problem = Problem.of(q, k, v, Options())
    for name, layout in (("q", q), ("k", k), ("v", v)):
        check_last_stride(name, layout)
    for name, d in (("q", problem.head_dim), ("v", problem.head_dim_v)):
        if d % CHUNK:
            raise ValueError(f"{name} has head dim {d}, expected a multiple of {CHUNK}")
    d = problem.head_dim
    if options.hadamard and d & (d - 1):
        raise ValueError(f"q has head dim {d}, expected a power of two with hadamard=True")


def _check_grad(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} has requires_grad=True, but quantisation has no backward pass: "
                "call within torch.no_grad(), or detach it"
            )


@torch.library.custom_op("fa3::quantize_fp8", mutates_args=())
def _operator(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hadamard: bool,
    smooth_k: bool,
    block_scales: bool,
    v_per_channel: bool,
    rows_per_block: int,
    qk_dtype: torch.dtype,
    v_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run(
        q,
        k,
        v,
        hadamard,
        smooth_k,
        block_scales,
        v_per_channel,
        rows_per_block,
        qk_dtype,
        v_dtype,
    )


@_operator.register_fake
def _(q, k, v, *options):
    options = _Options(*options)
    _check_layouts(Layout.of(q), Layout.of(k), Layout.of(v), options)
    b, s_q, h_q, _ = q.shape
    _, s_k, h_k, dv = v.shape

    def scales(*shape):
        return q.new_empty(shape, dtype=torch.float32)

    if options.block_scales:
        num_k_blocks = num_blocks(s_k, options.rows_per_block)
        q_descale = scales(b, h_q, num_blocks(s_q, Q_BLOCK))
        k_descale, v_descale = (scales(b, h_k, num_k_blocks) for _ in range(2))
    else:
        q_descale, k_descale, v_descale = (scales(b, h_k) for _ in range(3))
    if options.v_per_channel:
        v_descale = scales(b, h_k, 1, dv)
    return (
        q.new_empty(q.shape, dtype=options.qk_dtype),
        k.new_empty(k.shape, dtype=options.qk_dtype),
        v.new_empty(v.shape, dtype=options.v_dtype),
        q_descale,
        k_descale,
        v_descale,
        scales(b, h_q, s_q) if options.smooth_k else scales(0),
    )
