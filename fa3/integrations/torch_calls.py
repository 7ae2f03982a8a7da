"""Calls that torch makes of its own attention, in fa3's order of dimensions: served, or not at all.

A call is served only if its backward pass is, too, so that both come from one implementation.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autograd, ops
from ..call.layout import ALIGNMENT, Layout, odd_dimension
from ..call.lengths import EQUAL, Lengths
from ..call.problem import Options, Problem
from ..call.scales import NO_DESCALES, Descales
from ..launch import dispatch

CAPABILITIES = (8, 9)  # major ones
FP8 = torch.float8_e4m3fn


class Unserved(Exception):
    """fa3 does not compute the call; the text says why."""


class Call(NamedTuple):
    """What is asked of q, k and v in fa3's order of dimensions."""

    options: tuple  # the first fields of Options
    lengths: Lengths = EQUAL
    longest: tuple = (None, None)
    descales: Descales = NO_DESCALES


def call_of(scale, causal, left=-1, right=-1, **others) -> Call:
    margin = torch._C._get_sm_carveout_experimental() or 0
    return Call((scale, causal, left, right, margin, 0.0), **others)


def refuse(**given) -> None:
    """Raise Unserved for an argument that is neither None, False nor 0."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            raise Unserved(f"{name} is a tensor")
        if value:
            raise Unserved(f"{name} is {value}")


@functools.lru_cache(maxsize=4096)
def _why_not(target, q, k, v, lengths, descales, *options) -> str | None:  # noqa: PLR0913
    """The reason why fa3 has no kernel for tensors with these fields of `Layout`."""
    if target.kind != "reference" and target.capability[0] not in CAPABILITIES:
        major, minor = target.capability
        return f"compute capability {major}.{minor}"
    lengths = Lengths(*(None if x is None else Layout(*x) for x in lengths))
    descales = Descales(*(None if x is None else Layout(*x) for x in descales))
    layouts = Layout(*q), Layout(*k), Layout(*v)
    try:
        problem = Problem.of(*layouts, Options(*options), descales, lengths=lengths)
        if target.kind != "reference":
            dispatch.forward(problem.signature, target)
        is_inference = lengths.seqused_k or lengths.page_table or problem.dtype == FP8
        if not is_inference:  # which torch has no backward pass for either
            autograd.signature_of(problem)
    except (NotImplementedError, TypeError, ValueError) as error:
        return str(error).replace("\n ", ";")
    return None


def _check(q, k, v, call: Call) -> None:
    lengths, descales = (tuple(map(ops.fields, x)) for x in (call.lengths, call.descales))
    target = dispatch.target_of(q.device)
    reason = _why_not(target, *map(ops.fields, (q, k, v)), lengths, descales, *call.options)
    if reason is not None:
        raise Unserved(reason)


def _aligned(x: Tensor) -> Tensor:
    """x, copied where the last dimension is not contiguous or it starts at an odd address."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def forward(q, k, v, call: Call, out: Tensor, num_splits=None) -> Tensor:  # noqa: PLR0913
    """Write out, which has fa3's order of dimensions and any strides, and return the lse."""
    _check(q, k, v, call)
    if num_splits is None:
        num_splits = 1 if torch.are_deterministic_algorithms_enabled() else 0
    q, k, v = map(_aligned, (q, k, v))
    fits = out.stride(-1) == 1 and odd_dimension(Layout.of(out)) is None
    direct = out if fits and out.data_ptr() % ALIGNMENT == 0 else None
    result, lse = ops.run(
        *(q, k, v, direct, call.options, call.descales),
        out_dtype=out.dtype,
        lengths=call.lengths,
        longest=call.longest,
        num_splits=num_splits,
    )
    if direct is None:
        out.copy_(result)
    return lse


def backward(dout, q, k, v, out, lse, call: Call, with_dq=True) -> tuple[Tensor, ...]:  # noqa: PLR0913
    """dq, dk and dv, contiguous in fa3's order of dimensions."""
    _check(q, k, v, call)
    deterministic = torch.are_deterministic_algorithms_enabled()
    more = None, deterministic, call.options, call.lengths
    return autograd.run(dout, q, k, v, out, lse, *more, with_dq=with_dq)[:3]
