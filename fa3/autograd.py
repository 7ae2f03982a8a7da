"""Gradients: the operator fa3::backward, and what autograd is told of fa3::forward.

Whatever needs gradients goes through the operators, so that hooks, checkpointing and the compiler
find it where they find every other operation of torch.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.types import Number

from . import ops, transforms
from .call import lengths as lengths_
from .call.layout import Layout, check_last_stride, check_like, odd_dimension, tma_strides
from .call.lengths import EQUAL, Lengths
from .call.problem import DTYPES, LOG2_E, Options, Problem
from .kernels.bwd_arguments import PARTS, BwdArguments
from .kernels.bwd_signature import BwdSignature
from .launch import dispatch, jit, tuning
from .reference import backward as reference_backward
from .reference import ragged as reference_ragged

_NAMES = [x.name for x in ops.forward._opoverload._schema.arguments]
# Arguments of fa3::forward whose presence changes what is computed, and that have no backward yet.
_WITHOUT = ("q_descale", "k_descale", "v_descale", "v_shift", "page_table")


class Plan(NamedTuple):
    """Everything about a backward pass that does not depend on where its tensors lie."""

    run: Callable[[Sequence], None]  # takes the fields of BwdArguments
    workspace: tuple[tuple, ...]  # shapes and dtypes of row_stats to dq_counters, and of tiles
    num_sequences: int | None  # of a ragged call
    scalars: tuple  # the last fields of BwdArguments
    strides: tuple  # for q, k, v, out, dout: those that TMA accepts, None to keep them
    copies: tuple  # which of these to copy first, their strides being no multiples of 16 bytes


@functools.lru_cache(maxsize=4096)
def plan_of(q, k, v, out, dout, lse, deterministic, wanted, lengths, *options) -> Plan:  # noqa: PLR0913
    """Check a call and find its kernels; tensors and each of lengths are the fields of a `Layout`.

    wanted: whether dq is, and whether dk and dv are.

    Raises:
        NotImplementedError: there is no backward pass for the case.
    """
    named = zip(("q", "k", "v", "out", "dout"), (q, k, v, out, dout), strict=True)
    layouts = {name: Layout(*fields) for name, fields in named}
    inputs = (layouts[name] for name in ("q", "k", "v"))
    problem = Problem.of(*inputs, Options(*options), lengths=_layouts(lengths))
    for name in ("out", "dout"):
        check_like(name, layouts[name], problem.out_shape, problem.out_dtype, problem.device)
    check_like("lse", Layout(*lse), problem.lse_shape, torch.float32, problem.device)
    copies = tuple(
        odd_dimension(x) is not None or x.stride[-1] != 1 or 0 in x.stride[:-1]
        for x in layouts.values()
    )
    sources = zip(layouts.values(), copies, strict=True)
    strides = tuple(None if copy else tma_strides(layout) for layout, copy in sources)
    run, workspace, num_ctas = _kernel_of(problem, deterministic, wanted)
    _, scale_log2, softcap_log2, left, right = problem.scalars
    softcap_log2 = softcap_log2 if problem.softcap else None
    scalars = problem.softmax_scale, scale_log2, softcap_log2, left, right, num_ctas
    num_sequences = problem.batch if problem.sequences.is_ragged else None
    return Plan(run, workspace, num_sequences, scalars, strides, copies)


def _layouts(lengths) -> Lengths:
    return Lengths(*(None if fields is None else Layout(*fields) for fields in lengths))


def check(q, k, v, options, lengths, others: dict, plain: bool) -> None:  # noqa: PLR0913
    """Whether such a call has a backward pass, before anything is computed.

    options: the fields of `Options`; lengths: of `Lengths`; others: further tensors by the names of
    their arguments, or None; plain: what these are is known already.

    Raises:
        NotImplementedError: it has none.
    """
    refuse(others)
    if plain:
        _check_layouts(*map(ops.fields, (q, k, v)), tuple(map(ops.fields, lengths)), *options)


@functools.lru_cache(maxsize=4096)
def _check_layouts(q, k, v, lengths, *options) -> None:
    layouts = {"q": Layout(*q), "k": Layout(*k), "v": Layout(*v)}
    problem = Problem.of(*layouts.values(), Options(*options), lengths=_layouts(lengths))
    for name, layout in layouts.items():
        check_last_stride(name, layout)
    signature_of(problem)


def signature_of(problem: Problem, deterministic=False, wanted=(True, True)) -> BwdSignature:
    """What its kernels are compiled for; wanted: as of `plan_of`.

    Raises NotImplementedError if there is no backward pass for the problem.
    """
    if problem.widens:
        _refuse(f"k has dtype {problem.k_dtype} beside q of {problem.dtype}")
    if problem.scales is not None:
        _refuse(f"q has dtype {problem.dtype}, which is none of {', '.join(map(str, DTYPES))}")
    if problem.rows_per_query > 1:
        _refuse(f"rows_per_query is {problem.rows_per_query}")
    forward = problem.signature
    tiles = tuning.backward_tiles(forward.head_dim, forward.head_dim_v)
    facts = forward.mask, deterministic and wanted[0], forward.is_ragged, forward.score
    signature = BwdSignature(forward.dtype, *tiles, *facts, *wanted)
    if problem.device.type != "meta":
        target = dispatch.target_of(problem.device)
        if target.kind != "reference":
            dispatch.backward(signature, target)
    return signature


def sinks_without(sink, cu_seqlens_q) -> dict:
    """Sinks that have no gradient yet, by what they are called."""
    if sink is None or cu_seqlens_q is None or sink.dim() < 2:
        return {}
    return {"learnable_sink of shape (batch, h_q) beside cu_seqlens_q": sink}


def refuse(others: dict) -> None:
    """Raises NotImplementedError if there is a tensor among these."""
    for name, tensor in others.items():
        if tensor is not None:
            _refuse(f"{name} is a tensor")


def _refuse(why: str) -> None:
    raise NotImplementedError(
        f"q, k, v or learnable_sink has requires_grad=True, but {why}, and there is no backward "
        "pass for that yet: call within torch.no_grad(), or detach them"
    )


def _kernel_of(problem: Problem, deterministic: bool, wanted: tuple) -> tuple[Callable, tuple, int]:
    """The function to call, compiled, Plan.workspace, and the most CTAs it may launch."""
    signature = signature_of(problem, deterministic, wanted)
    if problem.is_empty or problem.s_k == 0 or problem.device.type == "meta":
        return _set_to_zero, _NO_WORKSPACE, 0
    target = dispatch.target_of(problem.device)
    if target.kind == "reference":
        return reference_backward.bind(signature), _NO_WORKSPACE, 0
    kernel = dispatch.backward(signature, target)
    config = tuning.backward(signature, target.capability)
    run = jit.compile(kernel.where, signature, config, target.kind, target.arch)
    return run, _workspace(problem, signature, config), target.num_sms - problem.sm_margin


def _workspace(problem: Problem, signature: BwdSignature, config: tuning.AnyBwdConfig) -> tuple:
    """Plan.workspace; a sequence of packed queries has blocks of its own."""
    sequences, tile_m = problem.sequences, config.tile_m
    blocks = problem.batch, problem.h_q, -(-problem.s_q // tile_m)
    if sequences.q_is_packed:
        blocks = 1, problem.h_q, problem.s_q // tile_m + problem.batch
    counters = tiles = None
    if signature.deterministic:
        counters = (*blocks, config.dq_counters), torch.int32
    if signature.is_ragged:
        from .kernels.simple.rounds import capacity  # imports the DSL, as the kernel has

        rows = problem.s_k, problem.h_k, sequences.k_is_packed
        tiles = (capacity(config.tile_n, sequences.batch, *rows),), torch.int32
    stats, sums, parts = ((*blocks, 2 * tile_m), torch.float32), None, None
    if config.delta_in_parts:
        parts = (*blocks, PARTS * tile_m), torch.bfloat16
    if signature.with_dq:
        sums = (*blocks, tile_m * signature.head_dim), torch.float32
    return stats, parts, sums, counters, tiles


_NO_WORKSPACE = (None,) * 5


def _set_to_zero(arguments: Sequence) -> None:
    """Without a query or a key no gradient has a summand."""
    x = BwdArguments(*arguments)
    for gradient in (x.dq, x.dk, x.dv):
        if gradient is not None:
            gradient.zero_()


def run(  # noqa: PLR0913
    dout, q, k, v, out, lse, dlse, deterministic, options, lengths=EQUAL, sink=None, with_dq=True,
    with_dkv=True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv and d(sink), as `backward`.

    options: the fields of `Options`; lengths: of `Lengths`.
    """
    if sink is not None:
        layouts, given = map(Layout.of, (q, k, v)), tuple(map(ops.fields, lengths))
        Problem.of(
            *layouts, Options(*options), lengths=_layouts(given), learnable_sink=Layout.of(sink)
        )
        refuse(sinks_without(sink, lengths.cu_seqlens_q))
    given = q, k, v, out, dout
    fields = (ops.fields(x) for x in (*given, lse))
    wanted = with_dq, with_dkv
    plan = plan_of(*fields, deterministic, wanted, tuple(map(ops.fields, lengths)), *options)
    if lengths is not EQUAL and q.device.type == "cpu":
        lengths_.check_values(lengths, q.shape[-3], k.shape, (None, None), totals=False)
    if dlse is not None:
        check_like("dlse", Layout.of(dlse), lse.shape, torch.float32, q.device)
    given = [
        x.contiguous() if copy else x if strides is None else x.as_strided(x.shape, strides)
        for x, copy, strides in zip(given, plan.copies, plan.strides, strict=True)
    ]
    given = [x.clone() if x.data_ptr() % 16 else x for x in given]
    gradients = [_like(x) if is_wanted else None for x, is_wanted in _wanted(q, k, v, *wanted)]
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    row_stats, *others, tiles = (x and lse.new_empty(x[0], dtype=x[1]) for x in plan.workspace)
    more = NO_LENGTHS
    results = [lse.new_empty(0) if x is None else x for x in gradients]
    sink_shape = lse.shape[:-1]
    if plan.num_sequences is not None:
        more = *lengths_.views(lengths, q.device), tiles, plan.num_sequences
        *given, lse, dlse, dq, dk, dv = _with_batch(lengths, *given, lse, dlse, *gradients)
        gradients = dq, dk, dv
    if dlse is None:
        dlse = lse.new_empty(0, *lse.shape[1:])
    plan.run((*given, lse, dlse, *gradients, row_stats, *others, *more, *plan.scalars))
    if sink is None:
        return *results, lse.new_empty(0)
    if row_stats is None:
        counts = None
        if plan.num_sequences is not None:
            rows = given[0].shape[1]
            counts = reference_ragged.counts(rows, more[0], more[2], q.device)
        row_stats = reference_backward.row_stats(*given[3:], lse, dlse, counts)
    return *results, _gradient_of_sink(sink, row_stats).view(sink_shape)


NO_LENGTHS = (None,) * 7  # bwd_arguments.LENGTHS


def _with_batch(lengths: Lengths, q, k, v, out, dout, lse, dlse, dq, dk, dv) -> tuple:  # noqa: PLR0913
    """Packed tensors get a dimension of 1 for the batch."""
    if lengths.cu_seqlens_q is not None:
        given = q, out, dout, lse, dlse, dq
        q, out, dout, lse, dlse, dq = (None if x is None else x.unsqueeze(0) for x in given)
    if lengths.cu_seqlens_k is not None:
        k, v, dk, dv = (None if x is None else x.unsqueeze(0) for x in (k, v, dk, dv))
    return q, k, v, out, dout, lse, dlse, dq, dk, dv


def _wanted(q: Tensor, k: Tensor, v: Tensor, with_dq: bool, with_dkv: bool) -> Iterable[tuple]:
    """Each with whether its gradient is wanted."""
    return zip((q, k, v), (with_dq, with_dkv, with_dkv), strict=True)


def _like(x: Tensor) -> Tensor:
    """Room for its gradient."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gradient_of_sink(sink: Tensor, row_stats: Tensor) -> Tensor:
    """(b, h_q) fp32, of packed queries (1, h_q): less delta times the sink's part of a row's sum.

    row_stats: as of BwdArguments.
    """
    lse_log2, delta = row_stats.unflatten(-1, (2, -1)).unbind(-2)  # (b, h_q, m_blocks, tile_m)
    above = (sink.float() * LOG2_E).expand(row_stats.shape[:2])[..., None, None] - lse_log2
    return above.exp2_().mul_(delta).sum(dim=(-2, -1)).neg_()


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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    learnable_sink: Tensor | None = None,
    with_dq: bool = True,
    with_dkv: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and d(learnable_sink) of a call of fa3::forward whose results were out and lse.

    The last one is (b, h_q) in fp32, of packed queries (h_q,). Without a sink it is empty, and so
    is dq without with_dq, which saves its product, its sums and a kernel; and are dk and dv without
    with_dkv, which saves two products. One of the two must be wanted.

    deterministic, or torch.use_deterministic_algorithms: the same bits on every run.
    Rows that belong to no sequence, or do not count, have gradients of 0; nothing of them is read.
    """
    options = softmax_scale, causal, window_left, window_right, sm_margin, softcap
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    lengths = lengths_.given(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    more = options, lengths, learnable_sink, with_dq, with_dkv
    return run(dout, q, k, v, out, lse, dlse, deterministic, *more)


@backward.register_fake
def _(  # noqa: PLR0913
    dout, q, k, v, out, lse, dlse=None, softmax_scale=None, causal=False, window_left=-1,
    window_right=-1, sm_margin=0, softcap=0.0, deterministic=False, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    learnable_sink=None, with_dq=True, with_dkv=True,
):  # fmt: skip
    found = (
        _like(x) if is_wanted else lse.new_empty(0)
        for x, is_wanted in _wanted(q, k, v, with_dq, with_dkv)
    )
    return *found, lse.new_empty(0 if learnable_sink is None else lse.shape[:-1])


transforms.register(backward)
transforms.count_as_backward(backward)


def _remember(ctx, inputs, output) -> None:
    """What the backward pass of fa3::forward needs; the check is for calls of the operator."""
    named = dict(zip(_NAMES, inputs, strict=True))
    q, k, v, *options = (named[name] for name in ("q", "k", "v", *Options._fields))
    lengths = Lengths(*(named[name] for name in lengths_.NAMES))
    others = {name: named[name] for name in _WITHOUT}
    others |= sinks_without(named["learnable_sink"], lengths.cu_seqlens_q)
    check(q, k, v, options, lengths, others, plain=False)
    layouts = Lengths(*(None if x is None else Layout.of(x) for x in lengths))
    signature_of(Problem.of(*map(Layout.of, (q, k, v)), Options(*options), lengths=layouts))
    ctx.set_materialize_grads(False)
    *ctx.options, _ = options  # rows_per_query is 1
    ctx.deterministic = named["deterministic"]
    ctx.longest = named["max_seqlen_q"], named["max_seqlen_k"]
    ctx.save_for_backward(q, k, v, *output, named["learnable_sink"], *lengths)


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse, sink, *lengths = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * len(_NAMES)
        dout = torch.zeros_like(out)
    with_dq, *others = ctx.needs_input_grad[:3]
    with_dkv = any(others) or not with_dq  # that of a sink alone comes with these
    more = *lengths[:4], *ctx.longest, sink, with_dq, with_dkv
    *gradients, dsink = torch.ops.fa3.backward(
        dout, q, k, v, out, lse, dlse, *ctx.options, ctx.deterministic, *more
    )
    found = dict(zip(("q", "k", "v"), gradients, strict=True))
    if sink is not None:
        found["learnable_sink"] = dsink.sum_to_size(sink.shape).to(sink.dtype)
    needed = dict(zip(_NAMES, ctx.needs_input_grad, strict=False))  # without trailing defaults
    return tuple(found.get(name) if needed.get(name) else None for name in _NAMES)


ops.forward.register_autograd(_differentiate, setup_context=_remember)
