"""Softcap and attention sinks at their edges: scores and sinks of every size, NaN, no keys, FP8.

On the kernel and on the CPU path.
"""

import math
from dataclasses import replace

import pytest
import torch

import fa3

from . import reference, test_fp8
from .accuracy import assert_accurate, assert_lse
from .cases import Case, make_inputs
from .fp8_calls import E4M3, H_Q, real
from .fp8_cases import Fp8Case
from .test_forward import _attention

INF, NAN = math.inf, math.nan
KEYS = 100
CAP_ERROR = 5e-7  # of the cap: what the docstring of flash_attn_func says


@pytest.fixture(params=["kernel", "CPU path"])
def where(request) -> torch.device:
    if request.param == "kernel":
        return request.getfixturevalue("device")
    request.getfixturevalue("plain_torch")
    return torch.device("cpu")


def _levels(levels, h_q, where, dtype=torch.bfloat16):
    """q, k and v whose query i has the score levels[i] with every key, and the mean of v."""
    q, k = torch.zeros(1, len(levels), h_q, 64), torch.zeros(1, KEYS, 1, 64)
    q[..., 0], k[..., 0] = torch.tensor(levels)[None, :, None], 1.0
    v = torch.randn(1, KEYS, 1, 64).to(dtype)
    mean = v.double().mean(dim=1)[:, None]  # (1, 1, 1, 64)
    return [x.to(dtype).to(where) for x in (q, k, v)], mean


SIZES = [0.0, 1e-6, 2.0**-8, 0.5, 3.0, 20.0, 48.0, 200.0, 2.0**14, 2.0**30, 2.0**126]


@pytest.mark.parametrize("softcap", [1e-38, 1e-3, 1.0, 20.0, 50.0, 3e3, 1e30, 1e38])
def test_capped_scores_of_every_size(softcap, where):
    levels = [sign * x for x in SIZES for sign in (1, -1)]
    (q, k, v), mean = _levels(levels, 1, where)
    out, lse = fa3.flash_attn_func(q, k, v, 1.0, softcap=softcap, return_attn_probs=True)
    error = (out.cpu().double() - mean).abs().max()
    assert error <= 2.0**-8 * mean.abs().max()  # equal scores have equal weights, whatever the cap
    scores = q[0, :, 0, 0].cpu().double()
    wanted = softcap * (scores / softcap).tanh() + math.log(KEYS)
    limit = CAP_ERROR * softcap + 2.0**-22 * wanted.abs() + 2e-6
    assert ((lse[0, 0].cpu() - wanted).abs() <= limit).all()


# A score for every query, a sink for every head.
SCORES = {
    torch.bfloat16: [0.0, 3.0, -30.0, 30.0, 2816.0, -2816.0, 4992.0, -(2.0**30), 2.0**30],
    torch.float16: [0.0, 3.0, -30.0, 30.0, 2816.0, -2816.0, 4992.0],
    E4M3: [0.0, 3.0, -28.0, 28.0, 448.0, -448.0],
}
SINKS = [-INF, -1e30, -5000.0, -448.0, -28.0, 0.0, 4.0, 33.0, 452.0, 2820.0, 5000.0, 3e38, INF]


@pytest.mark.parametrize("dtype", SCORES, ids=str)
def test_sinks_of_every_size(dtype, where):
    """Far above and far below the scores of near and far rows."""
    (q, k, v), mean = _levels(SCORES[dtype], len(SINKS), where, dtype)
    sinks = torch.tensor(SINKS, device=where)
    out, lse = fa3.flash_attn_func(q, k, v, 1.0, learnable_sink=sinks, return_attn_probs=True)
    out, lse, sinks = out[0].cpu().double(), lse[0].mT.cpu().double(), sinks.cpu().double()
    of_keys = torch.tensor(SCORES[dtype], dtype=torch.float64)[:, None] + math.log(KEYS)
    wanted = torch.logaddexp(of_keys, sinks)  # (rows, heads)
    share = (of_keys - wanted).exp().nan_to_num(0.0)
    # what fp32 leaves of a difference between numbers this large
    slack = 2.0**-21 * torch.minimum(of_keys.abs(), sinks.abs()) + torch.finfo(out.dtype).eps
    limit = (share * slack.clamp(max=1.0) + 2.0**-8) * mean.abs().max()
    assert ((out - share[..., None] * mean[0, 0]).abs().amax(-1) <= limit).all()
    finite = wanted.isfinite()
    assert torch.equal(lse[~finite], wanted[~finite])
    assert ((lse - wanted).abs() <= 2.0**-21 * wanted.abs() + 2.0**-19)[finite].all()


CASE = Case(h_q=4, s_q=200, s_k=260, causal=True)
BOTH = replace(CASE, softcap=20.0)
FP8 = Fp8Case(h_q=4, s_q=200, s_k=260, causal=True, scales=("128", "64", "channels"), shifted=True)


def test_a_sink_of_minus_infinity_is_none(where):
    """To the bit."""
    sink = torch.full((4,), -INF, device=where)
    qkv = [x.values for x in make_inputs(CASE, where)]
    given, wanted = (_attention(CASE, *qkv, where, sink=x) for x in (sink, None))
    fp8, descales = [x.values for x in FP8.inputs(where)], FP8.descales(where)
    quantised = (test_fp8._call(FP8, *fp8, descales, sink=x) for x in (sink, None))
    for a, b in ((given, wanted), quantised):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_rows_that_see_no_key(where):
    """Zeros, without the shift of v, and the lse is the sink: the sum has nothing else."""
    sink = torch.tensor([0.5, -700.0, -INF, 3e4], device=where)
    few = replace(BOTH, s_k=70)
    qkv = [x.values for x in make_inputs(few, where)]
    result = [_attention(few, *qkv, where, sink=sink)]
    few = replace(FP8, s_k=70, softcap=20.0)
    fp8, descales = [x.values for x in few.inputs(where)], few.descales(where)
    result.append(test_fp8._call(few, *fp8, descales, sink=sink))
    for out, lse in result:
        assert torch.equal(out[:, :130], torch.zeros_like(out[:, :130]))
        assert torch.equal(lse[:, :, :130], sink[None, :, None].expand(1, 4, 130))
        assert (out[:, 130:, 0] != 0).all()


@pytest.mark.parametrize("sink", [torch.randn(4), torch.randn(2, 4).bfloat16()], ids=["h", "bh"])
def test_no_key_at_all(sink, where):
    q, k = torch.zeros(2, 5, 4, 64), torch.zeros(2, 0, 2, 64)
    q, k, sink = (x.half().to(where) for x in (q, k, sink))
    out, lse = fa3.flash_attn_func(q, k, k, learnable_sink=sink, return_attn_probs=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, sink.float().expand(2, 4)[..., None].expand_as(lse))


def test_nan_stays_where_it_belongs(where):
    """Of a key: with those who see it. Of a sink: in its head."""
    q, k, v = (x.values for x in make_inputs(BOTH, where))
    sink = torch.randn(4, device=where)
    wanted, wanted_lse = _attention(BOTH, q, k, v, where, sink=sink)
    poisoned = k.clone()
    poisoned[0, 170, 1, 5] = NAN
    out, lse = _attention(BOTH, q, poisoned, v, where, sink=sink)
    first = 170 - (BOTH.s_k - BOTH.s_q)  # the query at that key
    assert out[0, first:, 2:].isnan().all() and lse[0, 2:, first:].isnan().all()
    assert torch.equal(out[:, :first], wanted[:, :first])
    assert torch.equal(out[:, :, :2], wanted[:, :, :2])
    assert torch.equal(lse[:, :, :first], wanted_lse[:, :, :first])
    sink[1] = NAN
    out, lse = _attention(BOTH, q, k, v, where, sink=sink)
    assert out[:, :, 1].isnan().all() and lse[:, 1].isnan().all()
    for head in (0, 2, 3):
        assert torch.equal(out[:, :, head], wanted[:, :, head])
        assert torch.equal(lse[:, head], wanted_lse[:, head])


def test_an_infinite_score_is_the_cap(where):
    """Not NaN, as it is without one."""
    q, k, v = (x.values for x in make_inputs(BOTH, where))
    k[0, 7, :, 0], q[..., 0] = INF, 1.0
    sink = torch.randn(4, device=where)
    out, lse = _attention(BOTH, q, k, v, where, sink=sink)
    assert out.isfinite().all() and lse.isfinite().all()
    options = {"causal": True, "softcap": 20.0, "sink": sink}
    wanted, wanted_lse = reference.exact(q, k, v, **options)
    assert_lse("lse", lse, wanted_lse)
    assert_accurate("out", out, wanted, reference.baseline(q, k, v, **options))


@pytest.mark.parametrize("form", ["head", "channels", "128"])
def test_the_shift_of_v_has_the_weight_of_the_keys(form, where):
    """Bytes of 0, so that the shift is all there is; the keys' weights add up to their share."""
    case = replace(FP8, scales=("128", "64", form))
    (q, k, v), descales = [x.values for x in case.inputs(where)], case.descales(where)
    sink = torch.tensor([-3.0, 5.0, 6.0, 20.0], device=where)
    _, lse = test_fp8._call(case, q, k, torch.zeros_like(v), descales, sink=-INF * sink.abs())
    share = (lse - sink[None, :, None]).sigmoid().mT[..., None]
    assert share.min() < 0.01 and share.max() > 0.99
    out, _ = test_fp8._call(case, q, k, torch.zeros_like(v), descales, sink=sink)
    wanted = share * descales["v_shift"].repeat_interleave(2, dim=1)[:, None]
    torch.testing.assert_close(out.float(), wanted, rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize(("softcap", "sink"), [(20.0, None), (0.0, 4.0)])
def test_quantising_first(softcap, sink, where):
    """Keys with a common offset, which smooth_k would take off: that would change the result."""
    q, k, v = real(offset=2.0)
    sink = None if sink is None else sink + torch.randn(H_Q)
    options = {"causal": True, "softcap": softcap}
    wanted, wanted_lse = reference.exact(q, k, v, precision=torch.float64, sink=sink, **options)
    given = (x.to(where) for x in (q, k, v))
    sink = None if sink is None else sink.to(where)
    out, lse = fa3.flash_attn_fp8_func(
        *given, learnable_sink=sink, return_attn_probs=True, **options
    )
    error = (out.cpu().double() - wanted.double()).square().mean().sqrt()
    assert error <= 0.08 * wanted.double().square().mean().sqrt()
    assert (lse.cpu() - wanted_lse).abs().mean() <= 0.05


LENGTHS = [(70, 90), (0, 5), (33, 0), (90, 70), (1, 40)]  # of queries, of keys


def _cumulated(lengths, where):
    return torch.tensor([0, *lengths]).cumsum(0).to(where, torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
@pytest.mark.parametrize("form", ["h", "bh"])
def test_sequences_with_lengths_of_their_own(form, dtype, where):
    """Each is what it is alone, to the bit, with sinks of its own."""
    of_q, of_k = zip(*LENGTHS, strict=True)
    rows = (of_q, 4), (of_k, 2), (of_k, 2)
    q, k, v = (torch.randn(sum(each), heads, 64).to(where, dtype) for each, heads in rows)
    sink = 3.0 + torch.randn((4,) if form == "h" else (len(LENGTHS), 4), device=where)
    options = {"causal": True, "softcap": 2.0, "return_attn_probs": True}
    more = {"v_shift": torch.randn(1, 2, 64, device=where)} if dtype == E4M3 else {}
    shift = {name: x.expand(len(LENGTHS), -1, -1) for name, x in more.items()}
    cu = _cumulated(of_q, where), _cumulated(of_k, where)
    out, lse = fa3.flash_attn_varlen_func(
        *(q, k, v, *cu, max(of_q), max(of_k)), **options, learnable_sink=sink, **shift
    )
    parts = (x.split(each) for x, (each, _) in zip((q, k, v), rows, strict=True))
    for i, (given, wanted, *alone) in enumerate(
        zip(out.split(of_q), lse.split(of_q, dim=1), *parts, strict=True)
    ):
        qkv = (x[None] for x in alone)
        one, its_lse = fa3.flash_attn_func(
            *qkv, **options, learnable_sink=sink.expand(len(LENGTHS), 4)[i], **more
        )
        assert torch.equal(given, one[0])
        assert torch.equal(wanted, its_lse[0])


@pytest.mark.parametrize("form", ["h", "bh"])
def test_sequences_without_any_key(form, where):
    q, nothing = torch.randn(sum(LENGTHS[0]), 4, 64), torch.zeros(0, 2, 64)
    of_q = (100, 0, 60)
    sink = torch.randn((4,) if form == "h" else (3, 4), device=where)
    q, nothing = (x.to(where, torch.bfloat16) for x in (q, nothing))
    cu = _cumulated(of_q, where), _cumulated((0, 0, 0), where)
    out, lse = fa3.flash_attn_varlen_func(
        *(q, nothing, nothing, *cu, 100, 0), learnable_sink=sink, return_attn_probs=True
    )
    assert torch.equal(out, torch.zeros_like(out))
    wanted = sink.expand(3, 4).repeat_interleave(torch.tensor(of_q, device=where), dim=0).mT
    assert torch.equal(lse, wanted)
