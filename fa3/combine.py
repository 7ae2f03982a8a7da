"""flash_attn_combine: results over parts of the keys become those over all of them."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import transforms
from .attend import check_out
from .call.layout import (
    Layout,
    check_address,
    check_disjoint,
    check_last_stride,
    check_like,
    check_tensors,
)
from .launch import dispatch, splits
from .plain import is_plain
from .reference import combine as reference

CHUNK = 4  # elements that a thread loads or stores at once
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Attention over all keys, of its results over parts of them.

    out_partial (num_splits, batch, s_q, h_q, dv) and lse_partial (num_splits, batch, s_q, h_q) in
    fp32: what queries get from each part of the keys, and the logarithm of the sum of exponentials
    that it was divided by. dv is a multiple of 4 and the last dimension of out_partial contiguous;
    other strides are free, but out_partial is copied first where one of them, or its address, is no
    multiple of 16 bytes.
    out: (batch, s_q, h_q, dv), receives the result. out_dtype: else its dtype: torch.float32, the
        default, torch.bfloat16 or torch.float16.

        lse = log(sum_i exp(lse_partial[i]))
        out = sum_i exp(lse_partial[i] - lse) out_partial[i]

    A part with an lse of -inf has no share, whatever its out is; where all have, out is 0 and lse
    -inf. Computed in fp32; both arguments have gradients.

    Returns out and lse (batch, s_q, h_q), fp32, in which queries are contiguous.

    Raises:
        TypeError, ValueError: the message names the argument; nothing was launched or written.
        NotImplementedError: out is given where gradients are asked for.
    """
    tensors = {"out_partial": out_partial, "lse_partial": lse_partial}
    check_tensors(**tensors)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    if out is None:
        if is_plain(out_partial, lse_partial) and not wants_grad:
            return _run(out_partial, lse_partial, None, out_dtype)
        return torch.ops.fa3.combine(out_partial, lse_partial, out_dtype)
    check_out(out)
    if wants_grad:
        raise NotImplementedError(
            "out is a tensor, but out_partial or lse_partial has requires_grad=True: give out_dtype"
        )
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"out_dtype is {out_dtype} but out has dtype {out.dtype}")
    if is_plain(out_partial, lse_partial, out):
        return _run(out_partial, lse_partial, out, None)
    return out, torch.ops.fa3.combine_out(out_partial, lse_partial, out)


def _run(parts: Tensor, part_lse: Tensor, out: Tensor | None, out_dtype) -> tuple[Tensor, Tensor]:
    layouts = (None if x is None else tuple(Layout.of(x)) for x in (parts, part_lse, out))
    run, copies = _plan_of(*layouts, out_dtype)
    if part_lse.data_ptr() % part_lse.itemsize:
        check_address("lse_partial", part_lse, part_lse.itemsize)
    if out is not None:
        check_address("out", out, CHUNK * out.itemsize)
        check_disjoint(out, out_partial=parts, lse_partial=part_lse)
        torch.autograd.graph.increment_version(out)
    out, lse = _results(parts, out, out_dtype)
    if copies or parts.data_ptr() % (CHUNK * parts.itemsize):
        parts = parts.clone(memory_format=torch.contiguous_format)
    run(parts, part_lse, out, lse, None, None)
    return out, lse


def _results(parts: Tensor, out: Tensor | None, out_dtype) -> tuple[Tensor, Tensor]:
    """Tensors for them, but for an `out` that is there."""
    _, b, s, h, dv = parts.shape
    if out is None:
        out = parts.new_empty(b, s, h, dv, dtype=out_dtype or torch.float32)
    return out, parts.new_empty(b, h, s).transpose(1, 2)


@functools.lru_cache(maxsize=1024)
def _plan_of(parts, part_lse, out, out_dtype) -> tuple[Callable, bool]:
    """The function to call, and whether to copy the parts first; of the fields of `Layout`s."""
    parts, part_lse = Layout(*parts), Layout(*part_lse)
    out = None if out is None else Layout(*out)
    _check(parts, part_lse, out, out_dtype)
    dtype = out_dtype or torch.float32 if out is None else out.dtype
    if 0 in parts.shape[1:] or parts.device.type == "meta":
        return _do_nothing, False
    target = dispatch.target_of(parts.device)
    if target.kind == "reference":
        return _reference, False
    return splits.combine(dtype, False, target), _odd(parts) is not None


def _check(parts: Layout, part_lse: Layout, out: Layout | None, out_dtype) -> None:
    """Raises TypeError or ValueError."""
    if parts.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"out_partial is on device {parts.device}, expected cuda or cpu")
    if parts.dtype != torch.float32:
        raise TypeError(f"out_partial has dtype {parts.dtype}, expected torch.float32")
    if len(parts.shape) != 5 or parts.shape[0] < 1:
        raise ValueError(
            f"out_partial has shape {tuple(parts.shape)}, expected (num_splits, batch, s_q, h_q, "
            "dv) with a num_splits of at least 1"
        )
    if parts.shape[-1] < CHUNK or parts.shape[-1] % CHUNK:
        raise ValueError(
            f"out_partial has head dim {parts.shape[-1]}, expected a multiple of {CHUNK}"
        )
    check_last_stride("out_partial", parts)
    check_like("lse_partial", part_lse, parts.shape[:-1], torch.float32, parts.device)
    if out_dtype not in (None, *OUT_DTYPES):
        raise ValueError(f"out_dtype is {out_dtype}, expected one of {OUT_DTYPES}")
    if out is None:
        return
    if out.dtype not in OUT_DTYPES:
        raise ValueError(f"out has dtype {out.dtype}, expected one of {OUT_DTYPES}")
    check_like("out", out, parts.shape[1:], out.dtype, parts.device)
    check_last_stride("out", out)
    if 0 not in out.shape and (dim := _odd(out)) is not None:
        raise ValueError(
            f"out has stride {out.stride[dim]} in dimension {dim}, expected a multiple of {CHUNK}"
        )


def _odd(layout: Layout) -> int | None:
    """The first dimension along which a thread's elements do not stay aligned."""
    return next((i for i, step in enumerate(layout.stride[:-1]) if step % CHUNK), None)


def _reference(parts, part_lse, out, lse, cu_seqlens, seqused) -> None:
    reference.forward(parts, part_lse, out, lse)


def _do_nothing(*arguments: Sequence) -> None:
    pass


@torch.library.custom_op("fa3::combine", mutates_args=())
def combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse, as of flash_attn_combine."""
    return _run(out_partial, lse_partial, None, out_dtype)


@torch.library.custom_op("fa3::combine_out", mutates_args=("out",))
def combine_out(out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
    """The lse; `out` is written."""
    return _run(out_partial, lse_partial, out, None)[1]


@combine.register_fake
def _(out_partial, lse_partial, out_dtype=None):
    _check(Layout.of(out_partial), Layout.of(lse_partial), None, out_dtype)
    return _results(out_partial, None, out_dtype)


@combine_out.register_fake
def _(out_partial, lse_partial, out):
    _check(Layout.of(out_partial), Layout.of(lse_partial), Layout.of(out), None)
    return _results(out_partial, out, None)[1]


def _remember(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _differentiate(ctx, dout, dlse):
    """d out_i = w_i dout, d lse_i = w_i (dout out_i - dout out + dlse), w_i = exp(lse_i - lse)."""
    parts, part_lse, lse = ctx.saved_tensors
    shares = reference.weights(part_lse, lse)
    summands = torch.zeros_like(part_lse) if dlse is None else dlse.expand_as(part_lse)
    dparts = None
    if dout is not None:
        dout = dout.float()
        counted = parts.masked_fill((shares == 0.0)[..., None], 0.0)
        products = (dout * counted).sum(dim=-1)
        summands = summands + products - (shares * products).sum(dim=0)
        dparts = shares[..., None] * dout
    return dparts, shares * summands, None


combine.register_autograd(_differentiate, setup_context=_remember)


def _batch_rule(operator):
    """vmap: its dimension joins the batch, which is the second of the parts'."""

    def rule(info, dims, parts, part_lse, last=None):
        def folded(x, dim, batch_dim):
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)

        given = [folded(x, dim, 1) for x, dim in zip((parts, part_lse), dims, strict=False)]
        results = operator(*given, last)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)

    return rule


transforms.register(combine, _batch_rule(combine))
transforms.refuse_tangents(combine_out)
