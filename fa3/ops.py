"""The way of one call, and the torch operators around it.

Eager code calls `run` directly, which saves the operator boundary; `torch.compile`, fake tensors
and dispatch modes go through `torch.ops.fa3`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, jit, reference, tuning
from .problem import (
    Layout,
    Options,
    Problem,
    check_address,
    check_disjoint,
    check_last_stride,
    check_out,
    odd_dimension,
    tma_strides,
)

LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    """Everything about a call that does not depend on where its tensors lie."""

    run: Callable  # run(q, k, v, out, lse, *scalars)
    scalars: tuple[float, int, int, int]  # softmax_scale_log2, window_left, window_right, num_ctas
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    views: tuple | None  # strides for q, k, v, out that TMA accepts where only size-1 ones are odd
    copies: (
        tuple | None
    )  # which of q, k, v must be copied, their strides being no multiples of 16 B


@functools.lru_cache(maxsize=4096, typed=True)
def plan_of(q, k, v, out, softmax_scale, causal, window_left, window_right, sm_margin) -> Plan:  # noqa: PLR0913
    """Check a call and find its kernel; the cache makes this free for a layout seen before.

    q, k, v and out (or None) are the fields of a `Layout`.
    """
    layouts = {"q": Layout(*q), "k": Layout(*k), "v": Layout(*v)}
    options = Options(softmax_scale, causal, window_left, window_right, sm_margin)
    problem = Problem.of(*layouts.values(), options)
    for name, layout in layouts.items():
        check_last_stride(name, layout)
    copies = tuple(odd_dimension(layout) is not None for layout in layouts.values())
    if out is not None:
        layouts["out"] = Layout(*out)
        check_out(layouts["out"], problem)
    run, num_ctas = _kernel_of(problem)
    views = tuple(tma_strides(layout) for layout in layouts.values())
    views = tuple(None if i < 3 and copies[i] else view for i, view in enumerate(views))
    return Plan(
        run,
        (problem.softmax_scale * LOG2_E, problem.window_left, problem.window_right, num_ctas),
        problem.out_shape,
        problem.lse_shape,
        views if any(views) else None,
        copies if any(copies) and not problem.is_empty else None,
    )


def _kernel_of(problem: Problem) -> tuple[Callable, int]:
    """The function to call, compiled, and the most CTAs it may launch."""
    if problem.is_empty or problem.device.type == "meta":
        return _do_nothing, 0
    if problem.s_k == 0:
        return _see_no_key, 0
    signature = problem.signature
    target = dispatch.target_of(problem.device)
    if problem.sm_margin >= target.num_sms and target.kind != "reference":
        raise ValueError(
            f"sm_margin is {problem.sm_margin}, expected less than {target.num_sms} SMs"
        )
    if target.kind == "reference":
        return reference.bind(signature), 0
    kernel = dispatch.forward(signature, target)
    run = jit.compile(kernel.where, signature, tuning.forward(signature), target.kind)
    return run, target.num_sms - problem.sm_margin


def _do_nothing(q, k, v, out, lse, *scalars):
    pass


def _see_no_key(q, k, v, out, lse, *scalars):
    out.zero_()
    lse.fill_(-math.inf)


def run(q, k, v, out, softmax_scale, causal, window_left, window_right, sm_margin):  # noqa: PLR0913
    """Attention of real tensors; `out` may be None. Returns out and lse (b, h_q, s_q).

    Nothing but allocation happens before the last check has passed. The compiled function takes
    the stream that is torch's current one on q's device, and makes that device current itself.
    """
    plan = plan_of(
        (q.shape, q.stride(), q.dtype, q.device),
        (k.shape, k.stride(), k.dtype, k.device),
        (v.shape, v.stride(), v.dtype, v.device),
        None if out is None else (out.shape, out.stride(), out.dtype, out.device),
        softmax_scale,
        causal,
        window_left,
        window_right,
        sm_margin,
    )
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_address(name, tensor)
    if out is None:
        out = q.new_empty(*plan.out_shape)  # sizes apart: half the time of a tuple of them
    else:
        check_address("out", out)
        check_disjoint(out, q=q, k=k, v=v)
        torch.autograd.graph.increment_version(out)
    lse = q.new_empty(*plan.lse_shape, dtype=torch.float32)
    if plan.copies is not None:
        tensors = zip((q, k, v), plan.copies, strict=True)
        q, k, v = (t.contiguous() if copy else t for t, copy in tensors)
    if plan.views is None:
        plan.run(q, k, v, out, lse, *plan.scalars)
    else:
        tensors = zip((q, k, v, out), (*plan.views, None), strict=False)
        views = (t if strides is None else t.as_strided(t.shape, strides) for t, strides in tensors)
        plan.run(*views, lse, *plan.scalars)
    return out, lse


@torch.library.custom_op("fa3::forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    return run(q, k, v, None, softmax_scale, causal, window_left, window_right, sm_margin)


@forward.register_fake
def _(q, k, v, *options):
    # the options may be symbols here; they change no shape and are checked when the call runs
    problem = Problem.of(Layout.of(q), Layout.of(k), Layout.of(v), Options())
    return q.new_empty(problem.out_shape), q.new_empty(problem.lse_shape, dtype=torch.float32)


@torch.library.custom_op("fa3::forward_out", mutates_args=("out",))
def forward_out(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    sm_margin: int = 0,
) -> Tensor:
    return run(q, k, v, out, softmax_scale, causal, window_left, window_right, sm_margin)[1]


@forward_out.register_fake
def _(q, k, v, out, *options):
    problem = Problem.of(Layout.of(q), Layout.of(k), Layout.of(v), Options())
    check_out(Layout.of(out), problem)
    return q.new_empty(problem.lse_shape, dtype=torch.float32)
