"""The way of one call, and the torch operators around it.

Eager code calls `run` directly, which saves the operator boundary; where somebody watches
(`plain.is_plain`), the call goes through `torch.ops.fa3`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.types import Number

from . import transforms
from .call import lengths as lengths_
from .call import scales
from .call.layout import (
    ALIGNMENT,
    Layout,
    check_address,
    check_disjoint,
    check_last_stride,
    odd_dimension,
    tma_strides,
)
from .call.lengths import EQUAL, Lengths, Sequences
from .call.listed import Tiles, listed
from .call.problem import Options, Problem, check_out
from .call.scales import NO_DESCALES, Descales, Scales
from .kernels.config import FwdConfig
from .launch import counters, dispatch, jit, splits, tuning
from .reference import attention as reference
from .reference import ragged as reference_ragged


class Plan(NamedTuple):
    """Everything about a call that does not depend on where its tensors lie."""

    run: Callable[[Sequence], None]  # takes the fields of FwdArguments
    scales: Scales | None  # of FP8 inputs
    sequences: Sequences
    tiles: Tiles | None  # of a ragged call, which has a list of them
    counter: Callable[[], Tensor] | None  # gives that of a dense call with a dynamic schedule
    scalars: tuple  # the last fields of FwdArguments, but for is_listed
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    lse_shape: tuple[int, ...]
    views: tuple | None  # strides for q, k, v, out that TMA accepts where only size-1 ones are odd
    copies: tuple | None  # which of q, k, v to copy, their strides being no multiples of 16 B
    split: "Split | None"  # where the results of `run` are partial


class Split(NamedTuple):
    """How the partial results of a call become its results."""

    number: int
    combine: Callable  # the kernel, compiled

    def partial(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out (.., s_q, h_q, number, dv) and lse (.., h_q, number, s_q), in fp32."""
        *rows, width = out.shape
        return (
            lse.new_empty(*rows, self.number, width),
            lse.new_empty(*lse.shape[:-1], self.number, lse.shape[-1]),
        )

    def finish(self, partial: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, lengths) -> None:
        """Write out (b, s_q, h_q, dv) and lse (b, h_q, s_q); of packed tensors b is 1.

        lengths: cu_seqlens_q and seqused_q of ragged sequences, else None twice.
        """
        parts, part_lse = partial
        lse = lse.transpose(1, 2)  # (b, s_q, h_q)
        self.combine(parts.permute(3, 0, 1, 2, 4), part_lse.permute(2, 0, 3, 1), out, lse, *lengths)


@functools.lru_cache(maxsize=4096)
def plan_of(  # noqa: PLR0913
    q, k, v, out, descales, sink, out_dtype, lengths, num_splits, longest, *options
) -> Plan:
    """Check a call and find its kernel; the cache makes this free for a layout seen before.

    q, k, v, out, sink and each of descales and lengths are the fields of a `Layout`, or None;
    options: of `Options`; longest: max_seqlen_q and max_seqlen_k, as far as a plan depends on them.
    """
    layouts = {"q": Layout(*q), "k": Layout(*k), "v": Layout(*v)}
    out = None if out is None else Layout(*out)
    problem = Problem.of(
        *layouts.values(),
        Options(*options),
        Descales(*map(_layout, descales)),
        out_dtype if out is None else out.dtype,
        Lengths(*map(_layout, lengths)),
        _layout(sink),
    )
    for name, layout in layouts.items():
        check_last_stride(name, layout)
    copies = tuple(odd_dimension(layout) is not None for layout in layouts.values())
    sources = zip(layouts.values(), copies, strict=True)
    views = [None if copy else tma_strides(layout) for layout, copy in sources]
    if out is not None:
        check_out(out, problem)
        views.append(tma_strides(out))
    run, num_ctas, tiles, counter, split = _kernel_of(problem, num_splits, longest)
    return Plan(
        run,
        problem.scales,
        problem.sequences,
        tiles,
        counter,
        (*problem.scalars, num_ctas, split and split.number, problem.given_rows_per_query),
        problem.out_shape,
        problem.out_dtype,
        problem.lse_shape,
        tuple(views) if any(views) else None,
        copies if any(copies) and not problem.is_empty else None,
        split,
    )


@functools.lru_cache(maxsize=4096)
def _check_layouts(q, k, v, out, lengths, sink, *options) -> None:  # noqa: PLR0913
    """As plan_of."""
    tensors = (Layout(*x) for x in (q, k, v))
    lengths = Lengths(*map(_layout, lengths))
    given = {"lengths": lengths, "learnable_sink": _layout(sink)}
    problem = Problem.of(*tensors, Options(*options), **given)
    if problem.device.type != "meta":
        _target_of(problem)
    if out is not None:
        check_out(Layout(*out), problem)


def _kernel_of(
    problem: Problem, num_splits: int, longest: tuple
) -> tuple[Callable, int, Tiles | None, Callable | None, Split | None]:
    """The function to call, compiled, the most CTAs it may launch, and fields of Plan."""
    if problem.is_empty or problem.device.type == "meta":
        return _do_nothing, 0, None, None, None
    signature = problem.signature
    if problem.s_k == 0:
        return functools.partial(reference_ragged.see_no_key, signature), 0, None, None, None
    target = _target_of(problem)
    if target.kind == "reference":
        return reference.bind(signature), 0, Tiles.of(problem, None, 1, 0), None, None
    kernel = dispatch.forward(signature, target)
    rows = rows_of(problem, longest)
    config, num_ctas, number = layout_of(problem, target, num_splits, longest, rows)
    split = None
    if number > 1:
        signature, is_ragged = signature.split(), problem.sequences.is_ragged
        split = Split(number, splits.combine(problem.out_dtype, is_ragged, target))
    run = jit.compile(kernel.where, signature, config, target.kind, target.arch)
    tiles = Tiles.of(problem, config, number, num_ctas)
    needs_counter = tiles is None and config.is_dynamic(signature)
    counter = counters.of(problem.device) if needs_counter else None
    return run, num_ctas, tiles, counter, split


def rows_of(problem: Problem, longest: tuple | None) -> int | None:
    """At most so many rows of q has any sequence; None where the plan does not depend on it."""
    if not problem.sequences.q_is_packed:
        return problem.s_q
    return None if longest is None else longest[0]


def layout_of(
    problem: Problem, target: dispatch.Target, num_splits: int, longest: tuple, rows: int | None
) -> tuple[FwdConfig, int, int]:
    """The config of a call's kernel, the most CTAs it may launch, and into how many parts keys go.

    num_splits: as asked for. The config is the same whether keys are split or not, but for what
    makes no other tiles.
    """
    signature, capability = problem.signature, target.capability
    config = tuning.forward(signature, capability, rows)
    num_ctas = target.num_sms - problem.sm_margin
    number = 1
    if num_splits != 1 and capability[0] == 9:
        number = splits.of(problem, config, num_ctas, num_splits, longest)
    if number > 1:
        config = tuning.forward(signature.split(), capability, rows)
    return config, num_ctas, number


def _target_of(problem: Problem) -> dispatch.Target:
    target = dispatch.target_of(problem.device)
    if problem.sm_margin >= target.num_sms and target.kind != "reference":
        raise ValueError(
            f"sm_margin is {problem.sm_margin}, expected less than {target.num_sms} SMs"
        )
    return target


def _do_nothing(arguments: Sequence) -> None:
    pass


def run(  # noqa: PLR0913
    q,
    k,
    v,
    out,
    options,
    descales=NO_DESCALES,
    out_dtype=None,
    check_scales=False,
    lengths=EQUAL,
    longest=(None, None),
    check_lengths=False,
    sink=None,
    num_splits=1,
    metadata=None,
) -> tuple[Tensor, Tensor]:
    """Attention of real tensors. Returns out and lse (b, h_q, s_q), of packed q (h_q, total_q).

    out: written, or None; then out_dtype is its dtype, by default q's, or bf16 of FP8 inputs.
    options: the fields of `Options`; descales: of `Descales`; lengths: of `Lengths`.
    longest: max_seqlen_q and max_seqlen_k, which are only compared with the lengths, where those
        can be read without waiting, or with check_lengths.
    sink: (h_q,) or (b, h_q), or None.
    num_splits: of the keys, 0: as many as fill the machine.
    metadata: the list of a ragged call's tiles, as get_scheduler_metadata makes it, or None.

    Nothing but allocation happens before the last check has passed. The compiled function takes
    the stream that is torch's current one on q's device, and makes that device current itself.
    """
    plan = _plan_for(q, k, v, out, options, descales, out_dtype, lengths, longest, sink, num_splits)
    if (
        descales is not NO_DESCALES
        or sink is not None
        or (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
    ):
        _check_addresses(q, k, v, descales, sink)
    if out is not None:
        check_address("out", out)
        others = {} if sink is None else {"learnable_sink": sink}
        check_disjoint(out, q=q, k=k, v=v, **scales.named(descales), **others)
    if check_scales:
        scales.check_values(**scales.named(descales))
    _check_lengths(q, k, lengths, longest, check_lengths)
    if metadata is not None:
        metadata = plan.tiles and listed(metadata, plan.tiles, q.device, lengths.seqused_q)
    if out is None:  # sizes apart: half the time of a tuple of them
        out = q.new_empty(*plan.out_shape, dtype=plan.out_dtype)
    else:
        torch.autograd.graph.increment_version(out)
    lse = q.new_empty(*plan.lse_shape, dtype=torch.float32)
    views = descales if plan.scales is None else plan.scales.views(q.device, *descales)
    target = out
    if plan.copies is not None or plan.views is not None:
        q, k, v, target = _for_tma(plan, q, k, v, out)
    views = *views, None if sink is None else sink.float().expand(plan.sequences.batch, q.shape[-2])
    if plan.split is not None:
        _run_split(plan, q, k, v, target, lse, views, lengths, metadata)
    elif lengths is EQUAL:
        plan.run(
            (q, k, v, target, lse, *views, *NO_LENGTHS, _counter(plan), *plan.scalars, *NEITHER)
        )
    else:
        plan.run(_ragged(plan, q, k, v, target, lse, views, lengths, metadata))
    return out, lse


def _plan_for(  # noqa: PLR0913
    q, k, v, out, options, descales, out_dtype, lengths, longest, sink, num_splits
) -> Plan:
    """plan_of, of the tensors themselves."""
    return plan_of(
        (q.shape, q.stride(), q.dtype, q.device),
        (k.shape, k.stride(), k.dtype, k.device),
        (v.shape, v.stride(), v.dtype, v.device),
        fields(out),
        NO_DESCALES if descales is NO_DESCALES else tuple(map(fields, descales)),
        fields(sink),
        out_dtype,
        EQUAL if lengths is EQUAL else tuple(map(fields, lengths)),
        num_splits,
        longest if num_splits == 0 else _few(longest),
        *options,
    )


def _few(longest: tuple) -> tuple | None:
    """All that a plan with a known number of splits has of it: whether queries are few."""
    rows = longest[0]
    return (tuning.FEW_ROWS, None) if rows is not None and rows <= tuning.FEW_ROWS else None


NO_LENGTHS = (None,) * 5  # FwdArguments.cu_seqlens_q to page_table
WHOLE = (None,) * 4  # the last fields of FwdArguments, for what signatures seldom ask for
NEITHER = WHOLE[2:]  # is_listed and cache_leftpad


def _counter(plan: Plan) -> Tensor | None:
    return None if plan.counter is None else plan.counter()


def _ragged(plan: Plan, q, k, v, out, lse, views, lengths, metadata) -> tuple:  # noqa: PLR0913
    """FwdArguments; packed tensors get a dimension of 1 for the batch."""
    if plan.sequences.q_is_packed:
        q, out, lse = q.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
    if plan.sequences.k_is_packed:
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    tiles = metadata
    if metadata is None:
        tiles = q.new_empty(plan.tiles.scratch if plan.tiles else 0, dtype=torch.int32)
    given = lengths_.views(lengths, q.device)
    last = int(metadata is not None), lengths_.leftpad(lengths, q.device)
    return q, k, v, out, lse, *views, *given, tiles, *plan.scalars, *last


def _run_split(plan: Plan, q, k, v, out, lse, views, lengths, metadata) -> None:  # noqa: PLR0913
    """Each split of a head is a head of the partial results."""
    parts, part_lse = plan.split.partial(out, lse)
    results = parts.flatten(-3, -2), part_lse.flatten(-3, -2)
    if lengths is EQUAL:
        counter = _counter(plan)
        plan.run((q, k, v, *results, *views, *NO_LENGTHS, counter, *plan.scalars, *NEITHER))
        plan.split.finish((parts, part_lse), out, lse, (None, None))
        return
    plan.run(_ragged(plan, q, k, v, *results, views, lengths, metadata))
    if plan.sequences.q_is_packed:
        parts, part_lse, out, lse = (x.unsqueeze(0) for x in (parts, part_lse, out, lse))
    cu_seqlens_q, _, seqused_q, *_ = lengths_.views(lengths, q.device)
    plan.split.finish((parts, part_lse), out, lse, (cu_seqlens_q, seqused_q))


def _layout(fields: tuple | None) -> Layout | None:
    return None if fields is None else Layout(*fields)


def fields(tensor: Tensor | None) -> tuple | None:
    """Those of its Layout, which takes longer to make."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _check_addresses(q, k, v, descales, sink) -> None:
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & (ALIGNMENT - 1):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_address(name, tensor)
    for x in descales:
        if x is not None and x.data_ptr() & (scales.BYTES - 1):
            for name, descale in scales.named(descales).items():
                check_address(name, descale, scales.BYTES)
    if sink is not None:
        check_address("learnable_sink", sink, sink.itemsize)


def prepare(  # noqa: PLR0913
    q, k, v, out, options, descales, lengths, longest, check_lengths, sink, num_splits, metadata
) -> None:
    """What `run` checks of a call ahead of which something else happens; its kernel is compiled."""
    plan = _plan_for(q, k, v, out, options, descales, None, lengths, longest, sink, num_splits)
    _check_lengths(q, k, lengths, longest, check_lengths)
    if metadata is not None and plan.tiles:
        listed(metadata, plan.tiles, q.device, lengths.seqused_q)


def check(q, k, v, out, lengths, longest, check_lengths, sink, *options) -> None:  # noqa: PLR0913
    """What `run` checks of all but scales, for a call that quantises q, k and v first."""
    q_k_v_out = map(fields, (q, k, v, out))
    _check_layouts(*q_k_v_out, tuple(map(fields, lengths)), fields(sink), *options)
    if out is not None:
        check_address("out", out)
    _check_lengths(q, k, lengths, longest, check_lengths)


def _check_lengths(q, k, lengths, longest, on_request: bool) -> None:
    lengths_.check_longest(longest)
    if on_request or (lengths is not EQUAL and q.device.type == "cpu"):
        lengths_.check_values(lengths, q.shape[-3], k.shape, longest, totals=on_request)


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
def forward(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    sm_margin: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    v_shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    check_scales: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    check_lengths: bool = False,
    softcap: Number = 0.0,
    learnable_sink: Tensor | None = None,
    deterministic: bool = False,
    page_table: Tensor | None = None,
    num_splits: int = 1,
    rows_per_query: int = 1,
    scheduler_metadata: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse, as of `run`. deterministic: what autograd is to do; the results always are."""
    options = softmax_scale, causal, window_left, window_right, sm_margin, softcap, rows_per_query
    descales = q_descale, k_descale, v_descale, v_shift
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    lengths = lengths_.given(*cu_seqlens, seqused_q, seqused_k, page_table, cache_leftpad)
    longest = max_seqlen_q, max_seqlen_k
    checks = out_dtype, check_scales, lengths, longest, check_lengths
    more = learnable_sink, num_splits, scheduler_metadata
    return run(q, k, v, None, options, descales, *checks, *more)


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
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    v_shift: Tensor | None = None,
    check_scales: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    check_lengths: bool = False,
    softcap: Number = 0.0,
    learnable_sink: Tensor | None = None,
    page_table: Tensor | None = None,
    num_splits: int = 1,
    rows_per_query: int = 1,
    scheduler_metadata: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
) -> Tensor:
    """The lse; `out` is written."""
    options = softmax_scale, causal, window_left, window_right, sm_margin, softcap, rows_per_query
    descales = q_descale, k_descale, v_descale, v_shift
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    lengths = lengths_.given(*cu_seqlens, seqused_q, seqused_k, page_table, cache_leftpad)
    longest = max_seqlen_q, max_seqlen_k
    checks = None, check_scales, lengths, longest, check_lengths
    more = learnable_sink, num_splits, scheduler_metadata
    return run(q, k, v, out, options, descales, *checks, *more)[1]


@forward.register_fake
def _(  # noqa: PLR0913
    q, k, v, softmax_scale=None, causal=False, window_left=-1, window_right=-1, sm_margin=0,
    q_descale=None, k_descale=None, v_descale=None, v_shift=None, out_dtype=None,
    check_scales=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, check_lengths=False, softcap=0.0, learnable_sink=None,
    deterministic=False, page_table=None, num_splits=1, rows_per_query=1,
    scheduler_metadata=None, cache_leftpad=None,
):  # fmt: skip
    descales = q_descale, k_descale, v_descale, v_shift
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, cache_leftpad
    problem = _fake(q, k, v, descales, out_dtype, lengths, learnable_sink)
    out = q.new_empty(problem.out_shape, dtype=problem.out_dtype)
    return out, q.new_empty(problem.lse_shape, dtype=torch.float32)


@forward_out.register_fake
def _(  # noqa: PLR0913
    q, k, v, out, softmax_scale=None, causal=False, window_left=-1, window_right=-1, sm_margin=0,
    q_descale=None, k_descale=None, v_descale=None, v_shift=None, check_scales=False,
    cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, check_lengths=False, softcap=0.0, learnable_sink=None,
    page_table=None, num_splits=1, rows_per_query=1, scheduler_metadata=None, cache_leftpad=None,
):  # fmt: skip
    descales = q_descale, k_descale, v_descale, v_shift
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, cache_leftpad
    problem = _fake(q, k, v, descales, out.dtype, lengths, learnable_sink)
    check_out(Layout.of(out), problem)
    return q.new_empty(problem.lse_shape, dtype=torch.float32)


def _fake(q, k, v, descales, out_dtype, lengths, sink) -> Problem:  # noqa: PLR0913
    """The options may be symbols; they change no shape and are checked when the call runs."""
    descales, lengths = (
        (None if x is None else Layout.of(x) for x in given) for given in (descales, lengths)
    )
    q, k, v, sink = (None if x is None else Layout.of(x) for x in (q, k, v, sink))
    return Problem.of(q, k, v, Options(), Descales(*descales), out_dtype, Lengths(*lengths), sink)


for _operator in (forward, forward_out):
    transforms.register(_operator)
    transforms.count_as_attention(_operator)


# FP8's operators, from before one operator served every dtype.
_library = torch.library.Library("fa3", "FRAGMENT")
_OTHERS = ", ".join(f"Tensor? {name}=None" for name in scales.NAMES) + (
    ", Scalar? softmax_scale=None, bool causal=False, int window_left=-1, int window_right=-1, "
    "int sm_margin=0, bool check_scales=False"
)
_QKV = "Tensor q, Tensor k, Tensor v"
_library.define(f"forward_fp8({_QKV}, {_OTHERS}) -> (Tensor, Tensor)")
_library.define(f"forward_fp8_out({_QKV}, Tensor(a!) out, {_OTHERS}) -> Tensor")
_NAMES = (*scales.NAMES, *Options._fields[:5], "check_scales")


@torch.library.impl(_library, "forward_fp8", "CompositeImplicitAutograd")
def _(q, k, v, *others, **named):
    return torch.ops.fa3.forward(q, k, v, **dict(zip(_NAMES, others, strict=False)), **named)


@torch.library.impl(_library, "forward_fp8_out", "CompositeImplicitAutograd")
def _(q, k, v, out, *others, **named):
    given = dict(zip(_NAMES, others, strict=False))
    return torch.ops.fa3.forward_out(q, k, v, out, **given, **named)
