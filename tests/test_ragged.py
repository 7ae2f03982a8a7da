"""Sequences with lengths of their own: accuracy, and that neighbours never meet."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import fa3
from fa3 import emulator
from fa3.call import lengths
from fa3.call.mask import MaskSpec
from fa3.inspect.cli import inspect
from fa3.kernels.signature import Signature, head_dim_tile
from fa3.launch import dispatch, jit

from . import reference
from .accuracy import assert_accurate, assert_lse
from .cases import Bordered
from .conftest import HOPPER
from .ragged_cases import RaggedCase, Rows, covering

SENTINEL = 7.0  # in rows of out and lse that belong to nobody
SEEDS = range(2)  # of random schedules


def _attention(case: RaggedCase, tensors, device, out=None):
    """out (entries, rows, h_q, dv) and lse (entries, h_q, rows); tensors: q, k, v as Bordered."""
    q, k, v = (x.tensor for x in tensors)
    queries, keys = case.queries, case.keys
    sms = dispatch.target_of(device).num_sms
    out, lse = fa3.flash_attn_varlen_func(
        queries.given(q),
        keys.given(k),
        keys.given(v),
        **case.arguments(device),
        sm_margin=0 if case.num_ctas is None else max(0, sms - case.num_ctas),
        return_attn_probs=True,
        out=None if out is None else queries.given(out),
    )
    is_packed = case.rows_q != "dense"
    return (out[None], lse[None]) if is_packed else (out, lse)


def _expected(case: RaggedCase, tensors):
    """Of each sequence: out and lse exactly, and out at the precision of the inputs."""
    each = (case.queries, case.keys, case.keys)
    cut = (rows.each(x.values) for rows, x in zip(each, tensors, strict=True))
    for q, k, v in zip(*cut, strict=True):
        if k.shape[1] == 0:
            out = q.new_zeros(*q.shape[:3], v.shape[3])
            yield out, torch.full((1, q.shape[2], q.shape[1]), -math.inf).to(q.device), out
        else:
            mask = case.mask
            exact, lse = reference.exact(q, k, v, case.softmax_scale, **mask)
            yield exact, lse, reference.baseline(q, k, v, case.softmax_scale, **mask)


def _empty_out(case: RaggedCase, q: Bordered) -> Bordered:
    shape = *q.values.shape[:3], case.head_dim_v
    return Bordered(torch.full(shape, SENTINEL).to(q.values), case.layout)


def _parts(case: RaggedCase, out, lse) -> tuple[list, list]:
    """What belongs to each sequence of out (entries, rows, ..) and lse (entries, h_q, rows)."""
    return list(case.queries.each(out)), list(case.queries.each(lse, row_dim=2))


def _assert_right(case: RaggedCase, tensors, outs, lses) -> None:
    expected = zip(*_expected(case, tensors), strict=True)
    exact, exact_lse, baseline = expected
    out = torch.cat(outs, dim=1)
    assert_accurate("out", out, torch.cat(exact, dim=1), torch.cat(baseline, dim=1))
    assert_lse("lse", torch.cat(lses, dim=2), torch.cat(exact_lse, dim=2))


def _check(case: RaggedCase, device) -> None:
    tensors = case.inputs(device)
    out = _empty_out(case, tensors[0])
    given, lse = _attention(case, tensors, device, out.tensor)
    _assert_right(case, tensors, *_parts(case, given, lse))
    for name, x in zip(("q", "k", "v", "out"), (*tensors, out), strict=True):
        x.assert_border_untouched(name)
    for rows in case.queries.each(out.tensor):
        rows.fill_(SENTINEL)
    assert (out.tensor == SENTINEL).all(), "rows of out that belong to nobody were written"


@pytest.mark.parametrize(
    "case",
    [
        RaggedCase((70, 0, 130), (200, 40, 0)),
        RaggedCase((70, 0, 130), (200, 40, 0), causal=True),
        RaggedCase((70, 0, 130), (200, 40, 0), window=(30, 20)),
    ],
    ids=str,
)
def test_first_light(case, device):
    _check(case, device)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_accuracy(case, device):
    _check(case, device)


MIXED = RaggedCase((70, 0, 130, 1), (200, 40, 0, 64), head_dim=128, head_dim_v=128, causal=True)


def test_a_sequence_is_computed_as_if_alone(device):
    """Bit by bit what a dense call gives."""
    tensors = MIXED.inputs(device)
    out, lse = _attention(MIXED, tensors, device)
    outs, lses = MIXED.queries.each(out), MIXED.queries.each(lse, row_dim=2)
    each = (MIXED.queries, MIXED.keys, MIXED.keys)
    cut = (rows.each(x.values) for rows, x in zip(each, tensors, strict=True))
    for q, k, v, given, given_lse in zip(*cut, outs, lses, strict=True):
        alone, alone_lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        assert torch.equal(given, alone)
        assert torch.equal(given_lse, alone_lse)


def test_grid_and_order_do_not_change_the_bits(device):
    tensors = MIXED.inputs(device)
    wanted, wanted_lse = _attention(MIXED, tensors, device)
    for num_ctas in (1, 2):
        out, lse = _attention(replace(MIXED, num_ctas=num_ctas), tensors, device)
        for a, b in ((out, wanted), (lse, wanted_lse)):
            row_dim = 1 if a.dim() == 4 else 2
            pairs = zip(MIXED.queries.each(a, row_dim), MIXED.queries.each(b, row_dim), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


# O waits for its store in a space of its own, where K is, and where K and V are.
SCHEDULED = [
    RaggedCase((70, 0, 193, 1), (300, 40, 0, 64), rows_k="slack", h_k=1, causal=True, num_ctas=2),
    RaggedCase(
        *((70, 0, 130), (400, 9, 0), "dense"), head_dim=128, head_dim_v=128, h_k=1, num_ctas=1
    ),
    RaggedCase(
        *((150, 5, 0), (200, 0, 9), "slack"),
        head_dim=256,
        head_dim_v=256,
        h_q=1,
        h_k=1,
        window=(90, 20),
        num_ctas=2,
    ),
]


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_ragged_sequences_are_the_same_under_every_schedule(case, device):
    """Those of the kernel that lists tiles, and of the one that computes them."""
    tensors = case.inputs(device)

    def attention():
        outs, lses = _parts(case, *_attention(case, tensors, device))
        return outs + lses

    found = emulator.compare_schedules(attention, SEEDS, checks=emulator.ALL_CHECKS)
    count = len(case.lengths_q)
    _assert_right(case, tensors, found[:count], found[count:])


def test_equal_lengths_on_one_side_only(device):
    """Dense queries, all of which count, beside packed keys; and the other way round."""
    q, k, v = (torch.randn(2, 70, 2, 64, device=device).bfloat16() for _ in range(3))
    cu = torch.tensor([0, 70, 140], dtype=torch.int32, device=device)
    wanted = fa3.flash_attn_func(q, k, v, causal=True)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    out = fa3.flash_attn_varlen_func(q, *packed[1:], None, cu, None, 70, causal=True)
    assert torch.equal(out, wanted)
    out = fa3.flash_attn_varlen_func(packed[0], k, v, cu, None, 70, None, causal=True)
    assert torch.equal(out, wanted.flatten(0, 1))


# Sequences that overlap write the same rows of out.
SHARING_OUT = tuple(set(emulator.ALL_CHECKS) - {"global", "race"})


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([0, 90, 40, 120], [0, 50, 100, 150]),  # falls
        ([0, 60, 120, 4000], [0, 50, 100, 5000]),  # beyond the tensors
        ([-9, 60, 120, 120], [-50, 50, 100, 150]),
        ([0, 2**31 - 1, -(2**31), 120], [2**31 - 1, 0, 5, -1]),
    ],
    ids=str,
)
def test_bad_lengths_reach_nothing_else(cu_q, cu_k, device, monkeypatch):
    """The host cannot know them on a GPU. What is around the tensors stays as it is."""
    monkeypatch.setattr(lengths, "check_values", lambda *arguments, **options: None)
    rows = Rows("packed", (120,)), Rows("packed", (150,))
    q, k, v, out = (
        Bordered(torch.randn(1, sum(side.lengths), 2, 64, device=device).bfloat16(), "bshd")
        for side in (rows[0], rows[1], rows[1], rows[0])
    )
    numbers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (cu_q, cu_k)]
    tensors = (x.tensor[0] for x in (q, k, v))
    with nullcontext() if HOPPER else emulator.options(checks=SHARING_OUT):
        fa3.flash_attn_varlen_func(*tensors, *numbers, 120, 150, out=out.tensor[0])
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        x.assert_border_untouched(name)


def test_other_lengths_need_no_other_kernel(device, monkeypatch):
    first = RaggedCase((70, 3), (40, 100))
    _check(first, device)
    monkeypatch.setattr(jit, "_build", None)
    monkeypatch.setattr(jit, "_load", None)
    _check(RaggedCase((5, 60, 100), (70, 0, 30), rows_q="dense", h_q=4), device)


def test_nothing_of_a_ragged_kernel_spills():
    """Its steady loop is that of the dense kernel; what a sequence is takes registers, too."""
    for case in {(c.dtype, c.head_dim, c.causal): c for c in covering()}.values():
        signature = Signature(
            case.dtype,
            head_dim_tile(case.head_dim),
            head_dim_tile(case.head_dim_v),
            MaskSpec.of(case.causal, *case.window).kind,
            is_ragged=True,
        )
        assert inspect(signature).report.resources.frame == 0, signature
