"""What torch's transforms ask of an operator: vmap, forward-mode AD, counts of operations.

It holds for every operator of fa3, but for those with a rule of their own, that the first dimension
of each tensor, given or returned, is the batch, but for packed tensors, and those of SHARED, which
may have none: then all entries have one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.library import CustomOpDef
from torch.utils import flop_counter

SHARED = {"learnable_sink": 1}  # argument -> its dimensions without the batch
_library = torch.library.Library("fa3", "FRAGMENT")


def register(operator: CustomOpDef, batch_rule: Callable | None = None) -> None:
    """Give the operator a rule for vmap, and have it refuse forward-mode AD."""
    operator.register_vmap(batch_rule or _BatchRule(operator))
    refuse_tangents(operator)


def count_as_attention(operator: CustomOpDef) -> None:
    """Tell FlopCounterMode what it costs: as torch's own attention, all pairs whatever the mask.

    A model's count then does not depend on which implementation of attention it uses.
    """
    packet = _overload(operator)._overloadpacket
    if packet not in flop_counter.flop_registry:  # a module may be loaded twice
        names = [x.name for x in _overload(operator)._schema.arguments]

        def operations(*arguments, out_val=None, **options) -> int:
            return _operations(**dict(zip(names, arguments, strict=False)), **options)

        flop_counter.register_flop_formula(packet, get_raw=True)(operations)


def count_as_backward(operator: CustomOpDef) -> None:
    """Tell FlopCounterMode what a backward pass costs: five products for the forward pass's two."""
    packet = _overload(operator)._overloadpacket
    if packet not in flop_counter.flop_registry:
        names = [x.name for x in _overload(operator)._schema.arguments]

        def operations(*arguments, out_val=None, **options) -> int:
            named = dict(zip(names, arguments, strict=False)) | options
            d, dv = named["q"].shape[-1], named["v"].shape[-1]
            dq, dkv = (named.get(name, True) for name in ("with_dq", "with_dkv"))
            return _operations(**named) // (d + dv) * ((1 + dq + dkv) * d + (1 + dkv) * dv)

        flop_counter.register_flop_formula(packet, get_raw=True)(operations)


def _operations(q, k, v, **others) -> int:
    """For each query head two matrix products: (s_q, d) by (d, s_k), (s_q, s_k) by (s_k, dv).

    Of packed sequences each with its own lengths, which are read from the device as torch does for
    its own attention; of those without memory each has the largest that max_seqlen allows.
    """
    lengths = [_lengths_of(x, side, others) for x, side in ((q, "q"), (v, "k"))]
    count = max(map(len, lengths))  # a dense batch is one length for all
    pairs = zip(*(x * count if len(x) == 1 else x for x in lengths), strict=True)
    batch = q.shape[0] if q.dim() == 4 and count == 1 else 1
    return 2 * batch * q.shape[-2] * sum(a * b for a, b in pairs) * (q.shape[-1] + v.shape[-1])


def _lengths_of(x: Tensor, side: str, others: dict) -> list[int]:
    """Of the sequences of a packed tensor, or a single one of a dense one."""
    cu_seqlens, longest = (others.get(f"{name}_{side}") for name in ("cu_seqlens", "max_seqlen"))
    if cu_seqlens is None:
        pages = others.get("page_table") if side == "k" else None
        return [x.shape[1] if pages is None else x.shape[1] * pages.shape[1]]
    if cu_seqlens.is_meta or type(cu_seqlens) is not Tensor:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


def has_tangent(tensor: Tensor) -> bool:
    """It is a dual number of forward-mode AD."""
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def _overload(operator: CustomOpDef) -> torch._ops.OpOverload:
    return operator._opoverload


class _BatchRule:
    """vmap of an operator: its dimension joins the batch, and leaves it again in the results."""

    def __init__(self, operator: CustomOpDef):
        self.operator = operator
        arguments = _overload(operator)._schema.arguments
        self.names = [x.name for x in arguments]
        self.written = [x.name if _is_written(x) else None for x in arguments]

    def __call__(self, info, dims, *arguments):
        for name, x in zip(self.names, arguments, strict=False):
            one_call = name.startswith("cu_seqlens") or name in ("page_table", "scheduler_metadata")
            if x is not None and one_call:
                raise NotImplementedError(
                    f"{name} is a tensor, but vmap has no rule for packed sequences or pages: "
                    "expected dense tensors, with seqused_q and seqused_k for their lengths"
                )
        n = info.batch_size
        batch = _batch_of(arguments[0], dims[0])
        given = list(arguments)
        targets = []  # what the operator is to write, and what it writes instead
        for i, (x, dim) in enumerate(zip(arguments, dims, strict=True)):
            if not isinstance(x, Tensor):
                continue
            if x.dim() - (dim is not None) == SHARED.get(self.names[i]):
                given[i] = _share(x, dim, batch)
                continue
            if self.written[i] is None:
                given[i] = _fold(x, dim, n)
                continue
            if dim is None:
                raise ValueError(
                    f"{self.written[i]} is not mapped over by vmap, but an input is, {n} times: "
                    f"expected an {self.written[i]} for each"
                )
            target = x.movedim(dim, 0)
            given[i] = target.new_empty(n * target.shape[1], *target.shape[2:])
            targets.append((target, given[i]))
        results = self.operator(*given)
        for target, written in targets:
            target.copy_(written.unflatten(0, (n, batch)))
        if isinstance(results, Tensor):
            return results.unflatten(0, (n, batch)), 0
        return _unfold(results, n, batch)


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _batch_of(x: Tensor, dim: int | None) -> int:
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def _fold(x: Tensor, dim: int | None, n: int) -> Tensor:
    """n times the batch; a copy if strides say so, and mostly where all entries share a tensor."""
    x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    x = x.reshape(n * x.shape[1], *x.shape[2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _share(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """A tensor without a batch: with one, if vmap has several of them."""
    return x if dim is None else x.movedim(dim, 0).repeat_interleave(batch, dim=0)


def _unfold(results, n: int, batch: int):
    """A result of one dimension stands for one that was not asked for, and is empty."""
    dims = tuple(None if x.dim() == 1 else 0 for x in results)
    return tuple(
        x if dim is None else x.unflatten(0, (n, batch))
        for x, dim in zip(results, dims, strict=True)
    ), dims


def refuse_tangents(operator: CustomOpDef) -> None:
    """torch's own rule for derivatives lets a custom operator pass with tangents of zero.

    It is registered for all devices at once; ours, for the devices we have, comes before it.
    """
    overload = _overload(operator)
    differentiate = make_autograd_impl(overload, operator)
    names = [x.name for x in overload._schema.arguments]

    def check(keyset, *arguments, **options):
        named = zip(names, arguments, strict=False) if forward_ad._current_level >= 0 else ()
        for name, x in named:
            if isinstance(x, Tensor) and has_tangent(x):
                raise NotImplementedError(
                    f"{name} has a tangent, but {overload._schema.name} has no forward-mode "
                    "derivative yet"
                )
        return differentiate(keyset, *arguments, **options)

    for device in ("CPU", "CUDA", "Meta"):
        _library.impl(overload, check, f"Autograd{device}", with_keyset=True)
