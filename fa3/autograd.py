"""Gradients: the operator fa3::backward, and what autograd is told of fa3::forward.

Whatever needs gradients goes through the operators, so that hooks, checkpointing and the compiler
find it where they find every other operation of torch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.types import Number

from . import ops, transforms
from .call.layout import Layout, check_last_stride, check_like, odd_dimension, tma_strides
from .call.problem import DTYPES, LOG2_E, Options, Problem
from .kernels.bwd_arguments import BwdArguments
from .kernels.bwd_signature import BwdSignature
from .launch import dispatch, jit, tuning
from .reference import backward as reference_backward

_NAMES = [x.name for x in ops.forward._opoverload._schema.arguments]
# Arguments of fa3::forward whose presence changes what is computed, and that have no backward yet.
_WITHOUT = (
    *("q_descale", "k_descale", "v_descale", "v_shift"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "learnable_sink"),
)


class Plan(NamedTuple):
    """Everything about a backward pass that does not depend on where its tensors lie."""

    run: Callable[[Sequence], None]  # takes the fields of BwdArguments
    workspace: tuple[tuple, ...]  # shapes and dtypes of row_stats to dq_counters
    scalars: tuple  # the last fields of BwdArguments
    strides: tuple  # for q, k, v, out, dout: those that TMA accepts, None to keep them
    copies: tuple  # which of these to copy first, their strides being no multiples of 16 bytes


@functools.lru_cache(maxsize=4096)
def plan_of(q, k, v, out, dout, lse, deterministic, *options) -> Plan:  # noqa: PLR0913
    """Check a call and find its kernels; tensors are the fields of a `Layout`.

    Raises:
        NotImplementedError: there is no backward pass for the case.
    """
    named = zip(("q", "k", "v", "out", "dout"), (q, k, v, out, dout), strict=True)
    layouts = {name: Layout(*fields) for name, fields in named}
    problem = Problem.of(layouts["q"], layouts["k"], layouts["v"], Options(*options))
    for name in ("out", "dout"):
        check_like(name, layouts[name], problem.out_shape, problem.out_dtype, problem.device)
    check_like("lse", Layout(*lse), problem.lse_shape, torch.float32, problem.device)
    copies = tuple(
        odd_dimension(x) is not None or x.stride[-1] != 1 or 0 in x.stride[:-1]
        for x in layouts.values()
    )
    sources = zip(layouts.values(), copies, strict=True)
    strides = tuple(None if copy else tma_strides(layout) for layout, copy in sources)
    run, workspace, num_ctas = _kernel_of(problem, deterministic)
    scale, mask = problem.softmax_scale, problem.mask
    scalars = scale, scale * LOG2_E, mask.left, mask.right, num_ctas
    return Plan(run, workspace, scalars, strides, copies)


def check(q, k, v, options, others: dict, plain: bool) -> None:
    """Whether such a call has a backward pass, before anything is computed.

    options: the fields of `Options`; others: further tensors by the names of their arguments, or
    None; plain: what these are is known already.

    Raises:
        NotImplementedError: it has none.
    """
    for name, tensor in others.items():
        if tensor is not None:
            _refuse(f"{name} is a tensor")
    if plain:
        _check_layouts(*map(ops.fields, (q, k, v)), *options)


@functools.lru_cache(maxsize=4096)
def _check_layouts(q, k, v, *options) -> None:
    layouts = {"q": Layout(*q), "k": Layout(*k), "v": Layout(*v)}
    problem = Problem.of(*layouts.values(), Options(*options))
    for name, layout in layouts.items():
        check_last_stride(name, layout)
    _signature_of(problem)


def _signature_of(problem: Problem, deterministic: bool = False) -> BwdSignature:
    """Raises NotImplementedError if there is no backward pass for the problem."""
    if problem.scales is not None:
        _refuse(f"q has dtype {problem.dtype}, which is none of {', '.join(map(str, DTYPES))}")
    if problem.softcap:
        _refuse(f"softcap is {problem.softcap}")
    tiles = problem.signature.head_dim, problem.signature.head_dim_v
    tiles = tuning.backward_tiles(*tiles)
    signature = BwdSignature(DTYPES[problem.dtype], *tiles, problem.mask.kind, deterministic)
    if problem.device.type != "meta":
        target = dispatch.target_of(problem.device)
        if target.kind != "reference":
            dispatch.backward(signature, target)
    return signature


def _refuse(why: str) -> None:
    raise NotImplementedError(
        f"q, k or v has requires_grad=True, but {why}, and there is no backward pass for that yet: "
        "call within torch.no_grad(), or detach them"
    )


def _kernel_of(problem: Problem, deterministic: bool) -> tuple[Callable, tuple, int]:
    """The function to call, compiled, Plan.workspace, and the most CTAs it may launch."""
    signature = _signature_of(problem, deterministic)
    if problem.is_empty or problem.s_k == 0 or problem.device.type == "meta":
        return _set_to_zero, _NO_WORKSPACE, 0
    target = dispatch.target_of(problem.device)
    if target.kind == "reference":
        return reference_backward.bind(signature), _NO_WORKSPACE, 0
    kernel = dispatch.backward(signature, target)
    config = tuning.backward(signature)
    run = jit.compile(kernel.where, signature, config, target.kind)
    blocks = problem.batch, problem.h_q, -(-problem.s_q // config.tile_m)
    row_stats, dq_sums = 2 * config.tile_m, config.tile_m * signature.head_dim
    counters = ((*blocks, config.num_mma_warpgroups), torch.int32) if deterministic else None
    workspace = ((*blocks, row_stats), torch.float32), ((*blocks, dq_sums), torch.float32), counters
    return run, workspace, target.num_sms - problem.sm_margin


_NO_WORKSPACE = (None,) * 3


def _set_to_zero(arguments: Sequence) -> None:
    """Without a query or a key no gradient has a summand."""
    x = BwdArguments(*arguments)
    for gradient in (x.dq, x.dk, x.dv):
        gradient.zero_()


def run(dout, q, k, v, out, lse, dlse, deterministic, options) -> tuple[Tensor, Tensor, Tensor]:  # noqa: PLR0913
    """dq, dk and dv; options: the fields of `Options`."""
    given = q, k, v, out, dout
    fields = (ops.fields(x) for x in (*given, lse))
    plan = plan_of(*fields, deterministic, *options)
    if dlse is not None:
        check_like("dlse", Layout.of(dlse), lse.shape, torch.float32, q.device)
    given = [
        x.contiguous() if copy else x if strides is None else x.as_strided(x.shape, strides)
        for x, copy, strides in zip(given, plan.copies, plan.strides, strict=True)
    ]
    given = [x.clone() if x.data_ptr() % 16 else x for x in given]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    lse = lse.contiguous()
    dlse = lse.new_empty(0, *lse.shape[1:]) if dlse is None else dlse.contiguous()
    workspace = (x and lse.new_empty(x[0], dtype=x[1]) for x in plan.workspace)
    plan.run((*given, lse, dlse, *gradients, *workspace, *plan.scalars))
    return tuple(gradients)


@torch.library.custom_op("fa3::backward", mutates_args=())
def backward(  # noqa: PLR0913
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    sm_margin: int = 0,
    softcap: Number = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a call of fa3::forward whose results were out and lse.

    deterministic, or torch.use_deterministic_algorithms: the same bits on every run.
    """
    options = softmax_scale, causal, window_left, window_right, sm_margin, softcap
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    return run(dout, q, k, v, out, lse, dlse, deterministic, options)


@backward.register_fake
def _(  # noqa: PLR0913
    dout, q, k, v, out, lse, dlse=None, softmax_scale=None, causal=False, window_left=-1,
    window_right=-1, sm_margin=0, softcap=0.0, deterministic=False,
):  # fmt: skip
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


transforms.register(backward)
transforms.count_as_backward(backward)


def _remember(ctx, inputs, output) -> None:
    """What the backward pass of fa3::forward needs; the check is for calls of the operator."""
    named = dict(zip(_NAMES, inputs, strict=True))
    q, k, v, *options = (named[name] for name in ("q", "k", "v", *Options._fields))
    check(q, k, v, options, {name: named[name] for name in _WITHOUT}, plain=False)
    _signature_of(Problem.of(*map(Layout.of, (q, k, v)), Options(*options)))
    ctx.set_materialize_grads(False)
    ctx.options, ctx.deterministic = tuple(options), named["deterministic"]
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * len(_NAMES)
        dout = torch.zeros_like(out)
    gradients = torch.ops.fa3.backward(
        dout, q, k, v, out, lse, dlse, *ctx.options, ctx.deterministic
    )
    needed = zip(gradients, ctx.needs_input_grad, strict=False)
    given = [x if is_needed else None for x, is_needed in needed]
    return (*given, *(None,) * (len(_NAMES) - len(given)))


ops.forward.register_autograd(_differentiate, setup_context=_remember)
