"""16-bit q, k and v -> the one-byte tensors and scales that attention in FP8 or INT8 takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import transforms
from .call import hints, lengths
from .call.layout import Layout, check_tensors
from .call.lengths import EQUAL, Lengths
from .call.problem import BYTE_DTYPES
from .call.scales import NAMES
from .launch import dispatch
from .plain import is_plain
from .quantize_plan import Plan, QuantizeOptions, Recipe, check_layouts, plans_of
from .reference import quantize as quantize_reference
from .segments import Segments


class Fp8Inputs(NamedTuple):
    """What flash_attn_func or flash_attn_varlen_func takes; shapes in quantize_fp8.

        out = flash_attn_func(x.q, x.k, x.v, **x.scales)

    value = byte * descale, and v_shift is added to all values of a channel of v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor
    lse_shift: Tensor | None = None
    v_shift: Tensor | None = None

    @property
    def scales(self) -> dict[str, Tensor | None]:
        """All that q, k and v need besides, by the names of flash_attn_func's arguments."""
        return {name: getattr(self, name) for name in NAMES}


@hints.closed
def quantize_fp8(  # noqa: PLR0913 - one argument per option
    q,
    k,
    v,
    *,
    hadamard=False,
    smooth_k=False,
    smooth_v=True,
    block_scales=True,
    v_per_channel=False,
    rows_per_block=128,
    qk_dtype=torch.float8_e4m3fn,
    v_dtype=torch.float8_e4m3fn,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    **unknown,
):
    """Quantise q (b, s_q, h_q, d), k (b, s_k, h_k, d) and v (b, s_k, h_k, dv) in bf16 or fp16.

    Head dims are multiples of 16 up to 256. Last dimensions are contiguous; other strides are free,
    and a tensor is copied first where one of them or its address is no multiple of 16 bytes.

    hadamard: rotate the rows of q and k, which leaves q k^T as it is and spreads outliers over all
        channels: a diagonal of fixed signs, then the Walsh-Hadamard transform, by 1 / sqrt(d).
        d must be a power of two, so it is off by default.
    smooth_k: subtract from k its mean over s_k, which softmax does not see, but its LSE does: off
        by default, so that the LSE is that of the original k.
    smooth_v: subtract from v its mean over s_k. What each channel then lacks on average, the mean
        error of the bytes included, is v_shift, which the kernel adds to its output.
    block_scales: one scale per block of rows; else per batch entry and key head, as FA3 takes them.
    v_per_channel: v has a scale per channel instead, whatever block_scales says.
    rows_per_block: keys per scale of k and v, 64 or 128; a scale of q has 128 rows.
    qk_dtype: of q and k, torch.float8_e4m3fn or torch.int8.
    v_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k: as in flash_attn_varlen_func, for sequences
        with lengths of their own: q (total_q, h_q, d) or k (total_k, h_k, d) and v (total_k, h_k,
        dv) packed, or the first rows of dense tensors; b is the number of sequences. They stay on
        the device and are read there; on CPU tensors they are checked.

    Returns Fp8Inputs. q, k and v are contiguous and have the shapes given; value = byte * descale,
    with descales in fp32, contiguous:

        descale     block_scales                           else
        q_descale   (b, h_q, ceil(s_q / 128))              (b, h_k)
        k_descale   (b, h_k, ceil(s_k / rows_per_block))   (b, h_k)
        v_descale   (b, h_k, ceil(s_k / rows_per_block))   (b, h_k)   v_per_channel: (b, h_k, 1, dv)

    lse_shift is None, or with smooth_k (b, h_q, s_q) in fp32: the products of the rows of q with
    the mean of k. Add softmax_scale * lse_shift to the LSE to get that of the original k.
    v_shift is None, or with smooth_v (b, h_k, dv) in fp32, c + mean of (v - c - v_descale * byte):
    both means are over s_k, and c is that of v.

    Of packed tensors, blocks begin at the first row of a sequence and none has rows of two:

        q_descale   (1, h_q, total_q // 128 + b)   [0, h, cu_seqlens_q[i] // 128 + i + j // 128]
        k_descale   (1, h_k, total_k // B + b)     [0, h, cu_seqlens_k[i] // B + i + j // B]
        v_descale   as k_descale

    for row j of sequence i, B being rows_per_block; lse_shift is (h_q, total_q). Means, peaks and
    errors of a sequence are those of its own rows that count. Other rows are not read, and their
    bytes and lse_shift are not written: in the new tensors they are uninitialised. Descales are all
    defined: 1 in blocks without rows, and for a sequence without rows, whose v_shift is 0.

    A descale is the largest finite magnitude under it over the largest code (e4m3 448, e5m2 57344,
    int8 127), at least 2^-126, and 1 where all is zero. Codes are rounded to nearest even and
    saturate. inf and NaN become NaN and change nothing else, except that hadamard spreads them over
    their row, smooth_k and smooth_v do not smooth channels whose mean is not finite (c is 0), and
    v_shift has their errors as 0. int8 has no NaN: there they become 0. Magnitudes over 1e36 may
    overflow in hadamard, smooth_k and smooth_v, and then count as NaN or as the largest code.

    Raises:
        TypeError, ValueError: the message names the argument; nothing was launched.
        NotImplementedError: a tensor that requires grad or has a tangent of forward-mode AD, or a
            GPU that is no Hopper.
    """
    if unknown:
        raise hints.unknown_argument(quantize_fp8, next(iter(unknown)))
    check_tensors(q=q, k=k, v=v)
    options = QuantizeOptions.of(
        hadamard, smooth_k, smooth_v, block_scales, v_per_channel, rows_per_block, qk_dtype, v_dtype
    )
    _check_grad(q=q, k=k, v=v)
    given = lengths.given(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    named = lengths.named(given)
    check_tensors(**named)
    if is_plain(q, k, v, *named.values()):
        *inputs, lse_shift, v_shift = _run(q, k, v, options, given)
    else:
        *inputs, lse_shift, v_shift = torch.ops.fa3.quantize_fp8(q, k, v, *options, *given[:4])
    return Fp8Inputs(
        *inputs, lse_shift if options.smooth_k else None, v_shift if options.smooth_v else None
    )


def _run(q, k, v, options: QuantizeOptions, given: Lengths):
    """As the operator fa3::quantize_fp8: lse_shift and v_shift are empty where not asked for."""
    layouts = ((x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v))
    of_lengths = EQUAL if given is EQUAL else Lengths(*map(_layout, given))
    target = None if q.is_meta else dispatch.target_of(q.device)
    plans = plans_of(*layouts, of_lengths, options, target)
    if given is not EQUAL and q.device.type == "cpu":
        lengths.check_values(given, q.shape[-3], k.shape, (None, None), totals=False)
    queries = Segments.of(q, given.cu_seqlens_q, given.seqused_q)
    keys = Segments.of(k, given.cu_seqlens_k, given.seqused_k)
    q, k, v = (plan.readable(x) for plan, x in zip(plans, (q, k, v), strict=True))
    k_mean, lse_shift, v_mean, v_errors = None, None, None, None
    if options.smooth_k:
        k_mean = _mean_of(k, plans[1], keys)
        lse_shift = k_mean.new_empty(_lse_shape(q))
    if options.smooth_v:
        v_mean = _mean_of(v, plans[2], keys)
        v_errors = keys.new_blocks(keys.entries(v), options.rows_per_block)
    q, q_descale = _quantize(q, plans[0], queries, k_mean, dot=lse_shift)
    k, k_descale = _quantize(k, plans[1], keys, k_mean)
    v, v_descale = _quantize(v, plans[2], keys, v_mean, errors=v_errors)
    v_shift = None
    if options.smooth_v:
        v_shift = v_mean + _mean_error(v_errors, v_descale, plans[2].recipe, keys)
    shifts = (q_descale.new_empty(0) if x is None else x for x in (lse_shift, v_shift))
    return q, k, v, q_descale, k_descale, v_descale, *shifts


def _layout(x: Tensor | None) -> Layout | None:
    return None if x is None else Layout.of(x)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    *batch, s, h, _ = q.shape
    return *batch, h, s


def _mean_of(x: Tensor, plan: Plan, segments: Segments) -> Tensor:
    """(b, h, d). Any row may be subtracted: 0, where the mean is not finite."""
    if segments.is_ragged:
        x, rows = segments.entries(x), plan.recipe.rows
        sums = segments.new_blocks(x, rows)
        if x.numel() and segments.batch:
            plan.sums(x, None, sums, None, None, None, *segments.arguments(rows, x.device))
        mean = segments.sum(sums, rows) / segments.lengths
    else:
        mean = x.mean(dim=1, dtype=torch.float32)
    return mean.nan_to_num(0.0, 0.0, 0.0).contiguous()


def _mean_error(errors: Tensor, descale: Tensor, recipe: Recipe, segments: Segments) -> Tensor:
    """(b, h, d), of sums over blocks in units of descales."""
    num_rows = max(1, segments.num_rows)
    errors = errors / num_rows  # first, as the sum of all might overflow
    if recipe.form == "block":
        mean = segments.sum(errors * descale[..., None], recipe.rows)
    else:
        each = descale[..., None] if recipe.form == "head" else descale[:, :, 0]
        mean = segments.sum(errors, recipe.rows) * each
    return mean * (num_rows / segments.lengths) if segments.is_ragged else mean


def _quantize(  # noqa: PLR0913
    x: Tensor, plan: Plan, segments: Segments, mean=None, dot=None, errors=None
) -> tuple[Tensor, Tensor]:
    """Bytes and descales of one tensor.

    mean (b, h_k, d): subtracted, but with dot, of the shape of an LSE, multiplied by the rows of x
        instead.
    errors (entries, h, n, d): gets the sums over blocks of what the bytes lack, in units of
        descales.
    """
    recipe = plan.recipe
    y = torch.empty(x.shape, dtype=recipe.dtype, device=x.device)
    shape = recipe.descale_shape(x.shape, segments)
    descale = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0 or segments.batch == 0:
        return y, descale.fill_(1.0)
    of_lengths = segments.arguments(recipe.rows, x.device)
    x, codes = segments.entries(x), segments.entries(y.view(torch.uint8))
    if dot is not None:
        dot = segments.entries(dot)
    if plan.amax is None:
        plan.cast(x, codes, descale, mean, dot, errors, *of_lengths)
        return y, descale
    h, d = x.shape[2:]
    peaks = segments.new_blocks(x, recipe.rows)
    plan.amax(x, None, peaks, mean if dot is None else None, None, None, *of_lengths)
    peaks = segments.amax(peaks, recipe.rows)  # (b, h, d)
    if recipe.form == "head":
        peaks = peaks.view(segments.batch, recipe.h_k, -1).amax(dim=2)
    descale.copy_(quantize_reference.descale_of(peaks, BYTE_DTYPES[recipe.dtype]).view_as(descale))
    factors = 1 / descale
    if recipe.form == "head":
        factors = factors.repeat_interleave(h // recipe.h_k, dim=1)[..., None].repeat(1, 1, d)
    plan.cast(x, codes, factors.view(segments.batch, h, d), mean, dot, errors, *of_lengths)
    return y, descale


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
    smooth_v: bool,
    block_scales: bool,
    v_per_channel: bool,
    rows_per_block: int,
    qk_dtype: torch.dtype,
    v_dtype: torch.dtype,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = QuantizeOptions(
        hadamard,
        smooth_k,
        smooth_v,
        block_scales,
        v_per_channel,
        rows_per_block,
        qk_dtype,
        v_dtype,
    )
    return _run(q, k, v, options, lengths.given(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k))


@_operator.register_fake
def _(q, k, v, *options_and_lengths):
    count = len(QuantizeOptions._fields)
    options = QuantizeOptions(*options_and_lengths[:count])
    given = Lengths(*options_and_lengths[count:])
    of_lengths = Lengths(*map(_layout, given))
    check_layouts(*map(Layout.of, (q, k, v)), options, of_lengths)
    recipes = options.recipes(k.shape[-2])
    queries = Segments.of(q, given.cu_seqlens_q, given.seqused_q)
    keys = Segments.of(k, given.cu_seqlens_k, given.seqused_k)
    tensors = {"q": (q, queries), "k": (k, keys), "v": (v, keys)}
    codes = [x.new_empty(x.shape, dtype=recipes[name].dtype) for name, (x, _) in tensors.items()]
    descales = [
        x.new_empty(recipes[name].descale_shape(x.shape, segments), dtype=torch.float32)
        for name, (x, segments) in tensors.items()
    ]
    lse_shape = _lse_shape(q) if options.smooth_k else (0,)
    shift_shape = (keys.batch, *v.shape[-2:]) if options.smooth_v else (0,)
    shifts = (q.new_empty(shape, dtype=torch.float32) for shape in (lse_shape, shift_shape))
    return *codes, *descales, *shifts


transforms.register(_operator)
