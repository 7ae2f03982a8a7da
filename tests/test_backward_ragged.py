"""Gradients of sequences with lengths of their own: accuracy, and that neighbours never meet."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.utils.checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fa3
from fa3 import autograd, emulator
from fa3.call import lengths
from fa3.call.mask import MaskSpec
from fa3.inspect.report import analyse
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import head_dim_tile
from fa3.launch import dispatch, jit, tuning

from . import reference
from .accuracy import assert_accurate
from .backward_cases import gradients
from .cases import MASKS, Bordered, pairwise
from .conftest import HOPPER
from .ragged_cases import RaggedCase, Rows

NAMES = ("dq", "dk", "dv")


@dataclass(frozen=True)
class RaggedBackwardCase(RaggedCase):
    """One call of flash_attn_varlen_func and the gradients of its inputs."""

    with_lse: bool = False
    deterministic: bool = False


# Few kernels, of every kind: dtype, head dims, mask, deterministic.
KERNELS = (
    ("bf16", (64, 64), MASKS[1], False),
    ("fp16", (96, 88), MASKS[3], True),
    ("bf16", (128, 128), MASKS[0], False),
    ("fp16", (120, 104), MASKS[1], True),
    ("bf16", (192, 128), MASKS[1], False),
    ("bf16", (256, 248), MASKS[2], False),
)
FACTORS = {
    "kernel": KERNELS,
    "lengths": (  # of q, of k
        ((70, 0, 5, 130), (100, 40, 0, 33)),
        ((0, 64), (0, 129)),
        ((1, 1, 1), (7, 140, 64)),
        ((200,), (70,)),
    ),
    "rows": (("packed", "packed"), ("slack", "slack"), ("dense", "packed"), ("slack", "dense")),
    "heads": ((2, 2), (2, 1), (3, 1)),
    "layout": ("bshd", "bhsd", "packed"),
    "scale": (None, 0.3),
    "num_ctas": (None, 1),
    "with_lse": (False, True),
}


def covering(seed: int = 1) -> list[RaggedBackwardCase]:
    """In the order of their kernels."""
    cases = []
    for row in pairwise(FACTORS, seed):
        dtype, (head_dim, head_dim_v), (causal, window), deterministic = row["kernel"]
        cases.append(
            RaggedBackwardCase(
                *row["lengths"],
                *row["rows"],
                dtype,
                head_dim,
                head_dim_v,
                *row["heads"],
                causal,
                window,
                row["layout"],
                row["scale"],
                row["num_ctas"],
                row["with_lse"],
                deterministic,
            )
        )
    return sorted(cases, key=lambda c: (c.head_dim, c.causal, repr(c)))


@pytest.fixture
def poisoned(monkeypatch):
    """New memory holds NaN, and counters that no tile would pass."""

    def fill(x):
        return x.fill_(math.nan if x.is_floating_point() else -(1 << 30))

    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *x, **more: fill(empty_like(*x, **more)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *x, **more: fill(new_empty(*x, **more)))


@dataclass(frozen=True)
class Call:
    """The tensors of a backward pass, with NaN in the rows that belong to nobody and around."""

    case: RaggedBackwardCase
    inputs: tuple[Bordered, Bordered, Bordered]
    out: Bordered
    dout: Bordered
    lse: torch.Tensor  # (entries, h_q, rows), as dlse
    dlse: torch.Tensor | None

    @staticmethod
    def of(case: RaggedBackwardCase, device) -> "Call":
        inputs = case.inputs(device)
        shape = *inputs[0].values.shape[:3], case.head_dim_v
        out, dout = (
            case.queries.bordered(torch.randn(shape).to(inputs[0].values), case.layout)
            for _ in range(2)
        )
        queries, keys = case.queries, case.keys
        q, k, v = (x.tensor for x in inputs)
        _, lse = fa3.flash_attn_varlen_func(
            *(queries.given(q), keys.given(k), keys.given(v)),
            **case.arguments(device),
            out=queries.given(out.tensor),
            return_attn_probs=True,
        )
        lse = lse if case.rows_q == "dense" else lse[None]
        numbers = torch.full_like(lse, math.nan), torch.full_like(lse, math.nan)
        for target, source in zip(*(queries.each(x, 2) for x in (numbers[0], lse)), strict=True):
            target.copy_(source)
        for target in queries.each(numbers[1], 2):
            target.copy_(torch.randn_like(target))
        dlse = numbers[1] if case.with_lse else None
        return Call(case, inputs, out, dout, numbers[0], dlse)

    def gradients(self, device) -> tuple[torch.Tensor, ...]:
        """Each (entries, rows, heads, width)."""
        case, queries, keys = self.case, self.case.queries, self.case.keys
        q, k, v = (x.tensor for x in self.inputs)
        given = {
            **{"dout": self.dout.tensor, "q": q, "out": self.out.tensor, "lse": self.lse},
            "dlse": self.dlse,
        }
        given = {n: None if x is None else queries.given(x) for n, x in given.items()}
        given |= {"k": keys.given(k), "v": keys.given(v)}
        options = case.arguments(device)
        options["window_left"], options["window_right"] = options.pop("window_size")
        if case.num_ctas is not None:
            options["sm_margin"] = dispatch.target_of(device).num_sms - case.num_ctas
        found = torch.ops.fa3.backward(**given, **options, deterministic=case.deterministic)
        packed = (case.rows_q != "dense", *[case.rows_k != "dense"] * 2)
        return tuple(x[None] if p else x for x, p in zip(found, packed, strict=True))

    def expected(self, attend) -> list[torch.Tensor]:
        """Of all sequences, one after another."""
        case, queries, keys = self.case, self.case.queries, self.case.keys
        rows = (queries, keys, keys)
        cut = [r.each(x.values) for r, x in zip(rows, self.inputs, strict=True)]
        dlses = [None] * len(case.lengths_q)
        if self.dlse is not None:
            dlses = list(queries.each(self.dlse, 2))
        found = []
        for *x, dout, dlse in zip(*cut, queries.each(self.dout.values), dlses, strict=True):
            x = [t.clone().requires_grad_() for t in x]
            if x[0].shape[1] == 0 or x[1].shape[1] == 0:
                found.append([torch.zeros_like(t) for t in x])
            else:
                results = attend(*x, case.softmax_scale, **case.mask)
                found.append(gradients(results, x, dout, dlse))
        return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


def _parts(case: RaggedCase, found) -> list[torch.Tensor]:
    """What belongs to sequences, one after another."""
    rows = (case.queries, case.keys, case.keys)
    return [torch.cat(list(r.each(x)), dim=1) for r, x in zip(rows, found, strict=True)]


def _check(case: RaggedBackwardCase, device) -> None:
    call = Call.of(case, device)
    found = call.gradients(device)
    given = _parts(case, found)
    expected = (call.expected(x) for x in (reference.exact, reference.baseline_with_lse))
    for name, *x in zip(NAMES, given, *expected, strict=True):
        assert_accurate(name, *x)
    for name, rows, x in zip(NAMES, (case.queries, case.keys, case.keys), found, strict=True):
        for own in rows.each(x):
            own.fill_(0.0)
        assert (x == 0).all(), f"{name}: rows that belong to nobody are not 0"
    for name, x in zip(("q", "k", "v", "out", "dout"), (*call.inputs, call.out, call.dout), strict=True):
        x.assert_border_untouched(name)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_accuracy(case, device, poisoned):
    _check(case, device)
