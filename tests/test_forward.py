"""The forward kernel through flash_attn_func: accuracy, and what it must never do."""

import math

import pytest
import torch

import fa3
from fa3.launch import dispatch

from . import reference
from .accuracy import assert_accurate, assert_lse
from .cases import SCORE_FACTORS, Bordered, Case, covering, make_inputs


def _attention(case: Case, q, k, v, device, out=None, sink=None):
    """(out, lse) of a case."""
    sms = dispatch.target_of(device).num_sms
    return fa3.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        window_size=case.window,
        sm_margin=0 if case.num_ctas is None else max(0, sms - case.num_ctas),
        return_attn_probs=True,
        out=out,
        softcap=case.softcap,
        learnable_sink=sink,
        num_splits=case.num_splits,
    )


def _check(case: Case, device) -> None:
    q, k, v = make_inputs(case, device)
    shape = case.batch, case.s_q, case.h_q, case.head_dim_v
    empty = torch.full(shape, math.nan, dtype=q.tensor.dtype, device=device)
    out = Bordered(empty, "bshd" if case.layout == "expanded" else case.layout)
    sink = case.learnable_sink(device)
    given, lse = _attention(case, q.tensor, k.tensor, v.tensor, device, out.tensor, sink)
    assert given is out.tensor
    inputs = q.values, k.values, v.values
    options = {**case.mask, "softcap": case.softcap, "sink": sink}
    exact, exact_lse = reference.exact(*inputs, case.softmax_scale, **options)
    baseline = reference.baseline(*inputs, case.softmax_scale, **options)
    assert_accurate("out", given, exact, baseline)
    assert_lse("lse", lse, exact_lse)
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        x.assert_border_untouched(name)


# Files that need a kernel come first in a quick look: one call of each kind of mask.
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(causal=True, s_q=200, s_k=200),
        Case(window=(30, 20), s_q=200, s_k=200),
    ],
    ids=str,
)
def test_first_light(case, device):
    _check(case, device)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_accuracy(case, device):
    _check(case, device)


@pytest.mark.parametrize("case", covering(SCORE_FACTORS), ids=str)
def test_accuracy_with_softcap_and_sinks(case, device):
    _check(case, device)


LONG = Case(head_dim=128, head_dim_v=128, s_q=300, s_k=300, causal=True)


def test_same_input_same_bits(device):
    q, k, v = (x.tensor for x in make_inputs(LONG, device))
    first, first_lse = _attention(LONG, q, k, v, device)
    again, again_lse = _attention(LONG, q, k, v, device)
    assert torch.equal(first, again)
    assert torch.equal(first_lse, again_lse)


def test_grid_does_not_change_the_bits(device):
    """One CTA that works off every tile, or one tile per CTA."""
    q, k, v = (x.tensor for x in make_inputs(LONG, device))
    wanted, wanted_lse = _attention(LONG, q, k, v, device)
    few = Case(**{**vars(LONG), "num_ctas": 1})
    given, lse = _attention(few, q, k, v, device)
    assert torch.equal(given, wanted)
    assert torch.equal(lse, wanted_lse)


def test_batch_entries_do_not_depend_on_each_other(device):
    case = Case(head_dim=128, head_dim_v=128, batch=3, s_q=100, s_k=150, causal=True)
    q, k, v = (x.tensor for x in make_inputs(case, device))
    wanted, _ = _attention(case, q, k, v, device)
    alone, _ = _attention(case, q[1:2], k[1:2], v[1:2], device)
    assert torch.equal(alone[0], wanted[1])


@pytest.mark.parametrize("factor", [1e-3, 30.0], ids=["flat", "peaked"])
def test_size_of_scores(factor, device):
    """Nearly uniform weights, and weights that are zero but for a few."""
    case = Case(head_dim=128, head_dim_v=128, s_q=130, s_k=260)
    q, k, v = (x.values for x in make_inputs(case, device))
    q = q * factor
    out, lse = _attention(case, q, k, v, device)
    exact, exact_lse = reference.exact(q, k, v)
    assert_accurate("out", out, exact, reference.baseline(q, k, v))
    assert_lse("lse", lse, exact_lse)


def test_maximum_that_keeps_growing(device):
    """Scores rise from key block to key block, so that every block rescales what came before."""
    case = Case(head_dim=128, head_dim_v=128, s_q=64, s_k=600)
    for sign in (1, -1):
        q, k, v = (x.values for x in make_inputs(case, device))
        q, k = torch.ones_like(q), k * 0.1
        k += (sign * torch.linspace(-8, 8, case.s_k, device=device).to(k.dtype))[
            None, :, None, None
        ]
        out, lse = _attention(case, q, k, v, device)
        exact, exact_lse = reference.exact(q, k, v)
        assert_accurate("out", out, exact, reference.baseline(q, k, v))
        assert_lse("lse", lse, exact_lse)


def test_scores_far_below_zero(device):
    """exp2 of any raw score is 0 here: the first maximum must be a row's own, however low."""
    case = Case(head_dim=128, head_dim_v=128, s_q=64, s_k=300, causal=True)
    q, k, v = (x.values for x in make_inputs(case, device))
    q, k = torch.full_like(q, 8.0), k * 0.1 - 8.0
    out, lse = _attention(case, q, k, v, device)
    exact, exact_lse = reference.exact(q, k, v, **case.mask)
    assert exact_lse.max() < -500
    assert_accurate("out", out, exact, reference.baseline(q, k, v, **case.mask))
    assert_lse("lse", lse, exact_lse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_bad_query_spoils_its_own_row_only(value, device):
    case = Case(head_dim=128, head_dim_v=128, s_q=40, s_k=300, h_q=1, h_k=1)
    q, k, v = (x.values for x in make_inputs(case, device))
    wanted, wanted_lse = _attention(case, q, k, v, device)
    q = q.clone()
    q[0, 17, 0, 5] = value
    out, lse = _attention(case, q, k, v, device)
    others = [i for i in range(case.s_q) if i != 17]
    assert torch.equal(out[0, others], wanted[0, others])
    assert torch.equal(lse[0, 0, others], wanted_lse[0, 0, others])
    assert out[0, 17].isnan().all()


def test_offsets_beyond_32_bits(device):
    """Batch entries four gigabytes apart; only the pages that hold values are ever touched."""
    case = Case(batch=2, h_q=1, h_k=1, s_q=70, s_k=90)
    values = [x.values for x in make_inputs(case, device)]
    far = []
    for x in (*values, torch.empty_like(values[0])):
        memory = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device=device)
        far.append(memory.as_strided(x.shape, (2**31, *x.stride()[1:])).copy_(x))
    wanted, wanted_lse = _attention(case, *values, device)
    out, lse = _attention(case, *far[:3], device, out=far[3])
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_no_key_at_all(device):
    case = Case(s_q=5, s_k=0)
    q, k, v = (x.values for x in make_inputs(case, device))
    out, lse = _attention(case, q, k, v, device)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"s_q": 0}, {"h_q": 0}, {"s_q": 0, "s_k": 0}], ids=str
)
def test_empty(sizes, device):
    case = Case(**sizes)
    q, k, v = (x.values for x in make_inputs(case, device))
    out, lse = _attention(case, q, k, v, device)
    assert out.shape == (case.batch, case.s_q, case.h_q, case.head_dim_v)
    assert lse.shape == (case.batch, case.h_q, case.s_q)


def test_strides_of_dimensions_of_size_one(device):
    """They are never used to reach anything, so TMA's rule does not apply to them."""
    case = Case(batch=1, h_q=1, h_k=1, s_q=70, s_k=90)
    q, k, v = (x.values for x in make_inputs(case, device))
    wanted, wanted_lse = _attention(case, q, k, v, device)
    odd = [x.as_strided(x.shape, (3, x.stride(1), 5, 1)) for x in (q, k, v)]
    out, lse = _attention(case, *odd, device)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_that_tma_cannot_express(name, dim, device):
    """They are no multiples of 16 bytes: the tensor is copied, the caller's is left alone."""
    case = Case(batch=2, s_q=70, s_k=90)
    given = dict(zip("qkv", (x.values for x in make_inputs(case, device)), strict=True))
    wanted, wanted_lse = _attention(case, *given.values(), device)
    x = given[name]
    b, length, heads, d = x.shape
    stride = list(x.new_empty(b, length + 8, heads + 1, d + 8).stride())  # room, so none overlap
    stride[dim] += 4
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, stride, strict=True))
    odd = x.new_full((span,), math.nan).as_strided(x.shape, stride).copy_(x)
    out, lse = _attention(case, *(given | {name: odd}).values(), device)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    assert odd.stride() == tuple(stride)


@pytest.mark.gpu
def test_stream_and_graph(device):
    """A side stream, and a CUDA graph that is replayed on new input."""
    q, k, v = (x.values for x in make_inputs(LONG, device))
    wanted, _ = _attention(LONG, q, k, v, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # were the kernel on the default stream, it would run now
        late = q * 1
        out, _ = _attention(LONG, late, k, v, device)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, wanted)
    graph = torch.cuda.CUDAGraph()
    captured = torch.zeros_like(q)
    with torch.cuda.graph(graph):
        out, _ = _attention(LONG, captured, k, v, device)
    captured.copy_(q)
    graph.replay()
    assert torch.equal(out, wanted)
