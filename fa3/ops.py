"""The way of one call, and the torch operators around it.

Eager code calls `run` or `run_fp8` directly, which saves the operator boundary; where somebody
watches (`plain.is_plain`), the call goes through `torch.ops.fa3`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.types import Number

from . import dispatch, jit, reference, scales, transforms, tuning
from .layout import (
    ALIGNMENT,
    Layout,
    check_address,
    check_disjoint,
    check_last_stride,
    odd_dimension,
    tma_strides,
)
from .problem import Options, Problem, check_out
from .scales import Descales, Scales

LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    """Everything about a call that does not depend on where its tensors lie."""

    # run(q, k, v, out, lse, *scalars); with one-byte inputs, descales and v_shift before scalars
    run: Callable
    scalars: tuple[float, int, int, int]  # softmax_scale_log2, window_left, window_right, num_ctas
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    views: tuple | None  # strides for q, k, v, out that TMA accepts where only size-1 ones are odd
    copies: (
        tuple | None
    )  # which of q, k, v must be copied, their strides being no multiples of 16 B


@functools.lru_cache(maxsize=4096)
def plan_of(q, k, v, out, softmax_scale, causal, window_left, window_right, sm_margin) -> Plan:  # noqa: PLR0913
    """Check a call and find its kernel; the cache makes this free for a layout seen before.

    q, k, v and out (or None) are the fields of a `Layout`.
    """
    layouts = {"q": Layout(*q), "k": Layout(*k), "v": Layout(*v)}
    options = Options(softmax_scale, causal, window_left, window_right, sm_margin)
    problem = Problem.of(*layouts.values(), options)
    return _plan(problem, layouts, None if out is None else Layout(*out))


@functools.lru_cache(maxsize=4096)
def plan_fp8_of(tensors, descales, *options) -> tuple[Plan, Scales]:
    """The same for one-byte inputs.

    tensors: the fields of the `Layout`s of q, k, v and out; descales: those of `Descales`.
    """
    q, k, v, out = _layouts(tensors)
    descales = Descales(*_layouts(descales))
    out_dtype = None if out is None else out.dtype
    problem = Problem.of(q, k, v, Options(*options), descales, out_dtype)
    return _plan(problem, {"q": q, "k": k, "v": v}, out), problem.scales


@functools.lru_cache(maxsize=4096)
def _check_layouts(tensors, *options) -> None:
    """tensors: the fields of the `Layout`s of q, k, v and out."""
    *inputs, out = _layouts(tensors)
    problem = Problem.of(*inputs, Options(*options))
    if problem.device.type != "meta":
        _target_of(problem)
    if out is not None:
        check_out(out, problem)


def _layouts(fields) -> list[Layout | None]:
    return [None if x is None else Layout(*x) for x in fields]


def _plan(problem: Problem, layouts: dict[str, Layout], out: Layout | None) -> Plan:
    for name, layout in layouts.items():
        check_last_stride(name, layout)
    copies = tuple(odd_dimension(layout) is not None for layout in layouts.values())
    sources = zip(layouts.values(), copies, strict=True)
    views = [None if copy else tma_strides(layout) for layout, copy in sources]
    if out is not None:
        check_out(out, problem)
        views.append(tma_strides(out))
    run, num_ctas = _kernel_of(problem)
    return Plan(
        run,
        (problem.softmax_scale * LOG2_E, problem.window_left, problem.window_right, num_ctas),
        problem.out_shape,
        problem.lse_shape,
        tuple(views) if any(views) else None,
        copies if any(copies) and not problem.is_empty else None,
    )


def _kernel_of(problem: Problem) -> tuple[Callable, int]:
    """The function to call, compiled, and the most CTAs it may launch."""
    if problem.is_empty or problem.device.type == "meta":
        return _do_nothing, 0
    if problem.s_k == 0:
        return _see_no_key, 0
    signature = problem.signature
    target = _target_of(problem)
    if target.kind == "reference":
        return reference.bind(signature), 0
    kernel = dispatch.forward(signature, target)
    run = jit.compile(kernel.where, signature, tuning.forward(signature), target.kind)
    return run, target.num_sms - problem.sm_margin


def _target_of(problem: Problem) -> dispatch.Target:
    target = dispatch.target_of(problem.device)
    if problem.sm_margin >= target.num_sms and target.kind != "reference":
        raise ValueError(
            f"sm_margin is {problem.sm_margin}, expected less than {target.num_sms} SMs"
        )
    return target


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
        _check_addresses(q, k, v)
    if out is None:
        out = q.new_empty(*plan.out_shape)  # sizes apart: half the time of a tuple of them
    else:
        check_address("out", out)
        check_disjoint(out, q=q, k=k, v=v)
        torch.autograd.graph.increment_version(out)
    lse = q.new_empty(*plan.lse_shape, dtype=torch.float32)
    if plan.copies is None and plan.views is None:
        plan.run(q, k, v, out, lse, *plan.scalars)
    else:
        plan.run(*_for_tma(plan, q, k, v, out), lse, *plan.scalars)
    return out, lse


def run_fp8(q, k, v, out, descales, *options, check_scales):
    """The same for one-byte q, k and v; descales: (q_descale, k_descale, v_descale, v_shift)."""
    tensors = _fields(q), _fields(k), _fields(v), _fields(out)
    plan, forms = plan_fp8_of(tensors, tuple(map(_fields, descales)), *options)
    _check_addresses(q, k, v, descales)
    if out is not None:
        check_address("out", out)
        check_disjoint(out, q=q, k=k, v=v, **scales.named(descales))
    if check_scales:
        scales.check_values(**scales.named(descales))
    if out is None:
        out = q.new_empty(*plan.out_shape, dtype=torch.bfloat16)
    else:
        torch.autograd.graph.increment_version(out)
    lse = q.new_empty(*plan.lse_shape, dtype=torch.float32)
    views = forms.views(q.device, *descales)
    plan.run(*_for_tma(plan, q, k, v, out), lse, *views, *plan.scalars)
    return out, lse


def _fields(tensor: Tensor | None) -> tuple | None:
    """Those of its Layout, which takes longer to make."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _check_addresses(q, k, v, descales=()) -> None:
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & (ALIGNMENT - 1):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_address(name, tensor)
    for x in descales:
        if x is not None and x.data_ptr() & (scales.BYTES - 1):
            for name, descale in scales.named(descales).items():
                check_address(name, descale, scales.BYTES)


def check(q, k, v, out, *options) -> None:
    """What `run` checks of the options and of `out`, for a call that quantises q, k and v first."""
    _check_layouts((_fields(q), _fields(k), _fields(v), _fields(out)), *options)
    if out is not None:
        check_address("out", out)


def _for_tma(plan: Plan, q, k, v, out) -> tuple[Tensor, ...]:
    """q, k, v and out as TMA can take them, copied where a view does not do."""
    if plan.copies is not None:
        tensors = zip((q, k, v), plan.copies, strict=True)
        q, k, v = (t.contiguous() if copy else t for t, copy in tensors)
    if plan.views is None:
        return q, k, v, out
    tensors = zip((q, k, v, out), (*plan.views, None), strict=False)
    return tuple(t if strides is None else t.as_strided(t.shape, strides) for t, strides in tensors)


@torch.library.custom_op("fa3::forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: Number | None = None,
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
    softmax_scale: Number | None = None,
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


@torch.library.custom_op("fa3::forward_fp8", mutates_args=())
def forward_fp8(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    v_shift: Tensor | None = None,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    sm_margin: int = 0,
    check_scales: bool = False,
) -> tuple[Tensor, Tensor]:
    descales = q_descale, k_descale, v_descale, v_shift
    options = softmax_scale, causal, window_left, window_right, sm_margin
    return run_fp8(q, k, v, None, descales, *options, check_scales=check_scales)


@forward_fp8.register_fake
def _(q, k, v, q_descale=None, k_descale=None, v_descale=None, v_shift=None, *options):  # noqa: PLR0913
    problem = _fake_fp8(q, k, v, None, q_descale, k_descale, v_descale, v_shift)
    out = q.new_empty(problem.out_shape, dtype=problem.out_dtype)
    return out, q.new_empty(problem.lse_shape, dtype=torch.float32)


@torch.library.custom_op("fa3::forward_fp8_out", mutates_args=("out",))
def forward_fp8_out(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    v_shift: Tensor | None = None,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    sm_margin: int = 0,
    check_scales: bool = False,
) -> Tensor:
    descales = q_descale, k_descale, v_descale, v_shift
    options = softmax_scale, causal, window_left, window_right, sm_margin
    return run_fp8(q, k, v, out, descales, *options, check_scales=check_scales)[1]


@forward_fp8_out.register_fake
def _(q, k, v, out, q_descale=None, k_descale=None, v_descale=None, v_shift=None, *options):  # noqa: PLR0913
    problem = _fake_fp8(q, k, v, out, q_descale, k_descale, v_descale, v_shift)
    check_out(Layout.of(out), problem)
    return q.new_empty(problem.lse_shape, dtype=torch.float32)


def _fake_fp8(q, k, v, out, *descales) -> Problem:
    given = Descales(*(None if x is None else Layout.of(x) for x in descales))
    layouts = Layout.of(q), Layout.of(k), Layout.of(v)
    return Problem.of(*layouts, Options(), given, None if out is None else out.dtype)


for _operator in (forward, forward_out, forward_fp8, forward_fp8_out):
    transforms.register(_operator)
    transforms.count_as_attention(_operator)
