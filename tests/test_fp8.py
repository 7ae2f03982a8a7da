"""The forward kernel for one-byte inputs through flash_attn_func."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch

import fa3
from fa3.launch import dispatch, tuning

from .accuracy import assert_accurate, assert_same_nonfinite
from .cases import Bordered
from .fp8_calls import values
from .fp8_cases import DTYPES, Fp8Case, covering
from .fp8_model import Numerics
from .fp8_model import attention as modelled
from .fp8_reference import Attention

# A statement about some thousand rows may not fail by chance: normal, 2e-9 of them are beyond.
DEVIATIONS = 6.0
# Errors that do not average out: of ex2.approx and lg2.approx, of roundings whose mean is not 0.
LSE_FLOOR = 1e-3


def _call(case: Fp8Case, q, k, v, descales, out=None, sink=None):
    """(out, lse) of a case; out has its dtype."""
    sms = dispatch.target_of(q.device).num_sms
    return fa3.flash_attn_func(
        q,
        k,
        v,
        case.softmax_scale,
        case.causal,
        window_size=case.window,
        sm_margin=0 if case.num_ctas is None else max(0, sms - case.num_ctas),
        return_attn_probs=True,
        out=_out(case, q.device) if out is None else out,
        softcap=case.softcap,
        learnable_sink=sink,
        num_splits=case.num_splits,
        **descales,
    )


def _out(case: Fp8Case, device) -> torch.Tensor:
    shape = case.batch, case.s_q, case.h_q, case.head_dim_v
    return torch.full(shape, math.nan, dtype=DTYPES[case.out], device=device)


def _exactly(case: Fp8Case, q, k, v, descales, sink=None) -> Attention:
    """Of bytes times their scales, in fp64 on the CPU."""
    arrays = (
        values(x.cpu(), None if scale is None else scale.cpu(), form)
        for x, scale, form in zip(
            (q, k, v), (descales.get(f"{x}_descale") for x in "qkv"), case.scales, strict=True
        )
    )
    shift = descales.get("v_shift")
    shift = None if shift is None else shift.cpu()
    sink = None if sink is None else sink.cpu()
    options = {**case.mask, "shift": shift, "softcap": case.softcap, "sink": sink}
    return Attention.of(*arrays, case.scale, **options)


def _assert_follows(case: Fp8Case, given, lse, attention: Attention, has_equal_scores=False):
    """Both within what rounding P to e4m3 costs, bytes and scales taken as they are.

    Equal scores are rounded alike, so that the errors of a row's sum do not average out.
    """
    dtype, config = DTYPES[case.out], tuning.forward(case.signature)
    sums_rounded = not config.o_slice  # else O has no room for the rows of ones that sum P
    baseline = attention.baseline(dtype, config.tile_n, sums_rounded)
    assert_accurate("out", given.cpu(), attention.exact(dtype), baseline)
    lse, exact = lse.cpu(), attention.lse
    assert lse.dtype == torch.float32
    assert_same_nonfinite("lse", lse, exact)
    finite = exact.isfinite()
    if not finite.any():
        return
    error = (lse.double() - exact)[finite].abs()
    floor = 2.0**-15 * exact[finite].abs().clamp(min=1)
    if not sums_rounded:
        assert (error <= floor).all()
        return
    worst, deviation = (bound[finite] for bound in attention.lse_bounds())
    assert (error <= worst + floor).all()
    if has_equal_scores:
        return
    assert (error <= DEVIATIONS * deviation + LSE_FLOOR + floor).all()
    assert error.mean() <= (deviation + LSE_FLOOR + floor).mean()


def _check(case: Fp8Case, device) -> None:
    q, k, v = case.inputs(device)
    descales = case.descales(device)
    out = Bordered(_out(case, device), "bshd" if case.layout == "expanded" else case.layout)
    sink = case.learnable_sink(device)
    given, lse = _call(case, q.tensor, k.tensor, v.tensor, descales, out.tensor, sink)
    assert given is out.tensor
    attention = _exactly(case, q.values, k.values, v.values, descales, sink)
    _assert_follows(case, given, lse, attention)
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        x.assert_border_untouched(name)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_accuracy(case, device):
    _check(case, device)


# Two kernels for all that follows.
FULL = Fp8Case(out="fp32", s_q=70, s_k=200, scales=("128", "64", "128"))
CAUSAL = replace(FULL, s_q=200, causal=True)


def _bytes(case: Fp8Case, device) -> list[torch.Tensor]:
    return [x.values for x in case.inputs(device)]


def _compare(case: Fp8Case, q, k, v, descales) -> Attention:
    """The call with these inputs keeps the rules; returns what is exact."""
    q, k, v = (x.to(DTYPES[dtype]) for x, dtype in zip((q, k, v), case.dtypes, strict=True))
    attention = _exactly(case, q, k, v, descales)
    _assert_follows(case, *_call(case, q, k, v, descales), attention)
    return attention


@pytest.mark.parametrize("case", [FULL, CAUSAL], ids=["full", "causal"])
def test_same_input_same_bits(case, device):
    """Again, with one CTA that works off every tile, and each batch entry alone."""
    case = replace(case, batch=2, s_q=200)
    inputs, descales = _bytes(case, device), case.descales(device)
    wanted = _call(case, *inputs, descales)
    for again in (case, replace(case, num_ctas=1)):
        for x, y in zip(_call(again, *inputs, descales), wanted, strict=True):
            assert torch.equal(x, y)
    alone = {name: x[1:] for name, x in descales.items()}
    given = _call(replace(case, batch=1), *(x[1:] for x in inputs), alone)
    for x, y in zip(given, wanted, strict=True):
        assert torch.equal(x[0], y[1])


def test_equal_scores(device):
    """P is a power of two: nothing is rounded."""
    q, k, v = (x.float() for x in _bytes(FULL, device))
    descales = FULL.descales(device) | {"k_descale": torch.ones(1, 2, 4, device=device)}
    for value in (0.0, 2.0, -2.0):
        _compare(FULL, torch.ones_like(q), torch.full_like(k, value), v, descales)


def test_scores_far_below_zero(device):
    """exp2 of any raw score is 0 here: the first maximum must be a row's own, however low."""
    q, k, v = (x.float() for x in _bytes(CAUSAL, device))
    attention = _compare(CAUSAL, torch.full_like(q, 8.0), k / 4 - 8.0, v, CAUSAL.descales(device))
    assert attention.lse.max() < -100


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("reach", [1.0, 8.0], ids=["gently", "steeply"])
def test_maximum_that_keeps_growing(reach, sign, device):
    """Scores rise from key block to key block, towards the first key or the last."""
    case = replace(FULL, s_q=64, s_k=600)
    q, k, v = (x.float() for x in _bytes(case, device))
    rise = sign * torch.linspace(-reach, reach, case.s_k, device=device)[None, :, None, None]
    _compare(case, torch.ones_like(q), k / 10 + rise, v, case.descales(device))


@pytest.mark.parametrize("above", [4.0, 9.0, 40.0])
def test_attention_sink(above, device):
    """The first key, which comes last, has most of the weight."""
    q, k, v = (x.float() for x in _bytes(CAUSAL, device))
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, 0, :, 0] = above
    _compare(CAUSAL, q, k, v, CAUSAL.descales(device))


NANS = {"nan": 0x7F, "-nan": 0xFF}


def _poisoned(x: torch.Tensor, place: tuple, bits: int) -> torch.Tensor:
    x = x.view(torch.uint8).clone()
    x[place] = bits
    return x.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("bits", NANS.values(), ids=NANS)
def test_nan_in_a_query_stays_in_its_row(bits, device):
    (q, k, v), descales = _bytes(FULL, device), FULL.descales(device)
    wanted, wanted_lse = _call(FULL, q, k, v, descales)
    out, lse = _call(FULL, _poisoned(q, (0, 17, 0, 5), bits), k, v, descales)
    assert out[0, 17, 0].isnan().all() and lse[0, 0, 17].isnan()
    out[0, 17, 0], lse[0, 0, 17] = wanted[0, 17, 0], wanted_lse[0, 0, 17]
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("bits", NANS.values(), ids=NANS)
def test_nan_in_a_key_stays_with_those_who_see_it(bits, device):
    (q, k, v), descales = _bytes(CAUSAL, device), CAUSAL.descales(device)
    wanted, wanted_lse = _call(CAUSAL, q, k, v, descales)
    out, lse = _call(CAUSAL, q, _poisoned(k, (0, 170, 1, 5), bits), v, descales)
    assert out[0, 170:, 1].isnan().all() and lse[0, 1, 170:].isnan().all()
    out[0, 170:, 1], lse[0, 1, 170:] = wanted[0, 170:, 1], wanted_lse[0, 1, 170:]
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("bits", NANS.values(), ids=NANS)
def test_nan_in_a_value_stays_in_its_channel(bits, device):
    (q, k, v), descales = _bytes(FULL, device), FULL.descales(device)
    wanted, wanted_lse = _call(FULL, q, k, v, descales)
    out, lse = _call(FULL, q, k, _poisoned(v, (0, 170, 1, 5), bits), descales)
    assert out[0, :, 1, 5].isnan().all()
    out[0, :, 1, 5] = wanted[0, :, 1, 5]
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_rows_that_see_no_key(device):
    case = replace(CAUSAL, s_q=200, s_k=70, shifted=True)
    inputs, descales = _bytes(case, device), case.descales(device)
    out, lse = _call(case, *inputs, descales)
    assert torch.equal(out[:, :130], torch.zeros_like(out[:, :130]))
    assert torch.equal(lse[:, :, :130], torch.full_like(lse[:, :, :130], -math.inf))
    assert (out[:, 130:] != 0).all() and lse[:, :, 130:].isfinite().all()


@pytest.mark.parametrize("case", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize(
    "scales",
    [
        {"q_descale": (0, 1)},
        {"k_descale": (0, 1, 0, 1)},
        {"k_descale": (1, 0, 0, 0)},
        {"q_descale": (1e-25, 1), "k_descale": (1e-25, 1, 1, 1e-25)},
        {"k_descale": (1e9, 1, 1, 1)},
        {"k_descale": (1, 1e9, 1, 1e9)},
        {"v_descale": (0, 1)},
        {"v_descale": (1e-30, 1e-38)},
    ],
    ids=str,
)
def test_scales_that_are_0_or_of_any_size(scales, case, device):
    """A scale of 0, or two that underflow together, is a block whose bytes are all 0."""
    case = replace(case, s_q=200)
    descales = case.descales(device)
    for name, factors in scales.items():
        descales[name] *= torch.tensor(factors, device=device)
    inputs = _bytes(case, device)
    attention = _exactly(case, *inputs, descales)
    _assert_follows(case, *_call(case, *inputs, descales), attention, has_equal_scores=True)


def test_scales_of_v_that_are_all_0(device):
    descales = FULL.descales(device)
    descales["v_descale"] *= 0.0
    out, lse = _call(FULL, *_bytes(FULL, device), descales)
    assert out.abs().max() < 2.0**-100
    assert lse.isfinite().all()


@pytest.mark.parametrize(
    "exponents", [(0, 40, 0), (40, 0, 40), (0, 100, 80), (80, 40, 0), (0, 100, -20)], ids=str
)
def test_scales_of_v_far_apart(exponents, device):
    """Rows that see only small ones are as exact as ever."""
    case = replace(CAUSAL, s_q=300, s_k=300)
    inputs, descales = _bytes(case, device), case.descales(device)
    descales["v_descale"] *= 2.0 ** torch.tensor(exponents, device=device)
    out, _ = _call(case, *inputs, descales)
    attention = _exactly(case, *inputs, descales)
    exact, baseline = attention.exact(torch.float32), attention.baseline(torch.float32, 128, True)
    for first in range(0, case.s_q, 128):
        rows = slice(first, first + 128)
        assert_accurate("out", out[:, rows].cpu(), exact[:, rows], baseline[:, rows])


def test_offsets_beyond_32_bits(device):
    """Batch entries gigabytes apart; only the pages that hold values are ever touched."""
    case = replace(FULL, batch=2, h_q=1, h_k=1, s_q=70, s_k=90)
    inputs, descales = _bytes(case, device), case.descales(device)
    wanted, wanted_lse = _call(case, *inputs, descales)
    far = []
    for x in (*inputs, _out(case, device)):
        distance = 2**32 // x.itemsize
        memory = torch.empty(distance + x[0].numel(), dtype=x.dtype, device=device)
        far.append(memory.as_strided(x.shape, (distance, *x.stride()[1:])).copy_(x))
    out, lse = _call(case, *far[:3], descales, far[3])
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_that_tma_cannot_express(name, device):
    """They are no multiples of 16 bytes: the tensor is copied."""
    case = replace(FULL, s_q=70, s_k=90)
    given = dict(zip("qkv", _bytes(case, device), strict=True))
    descales = case.descales(device)
    wanted, wanted_lse = _call(case, *given.values(), descales)
    odd = torch.cat([given[name], given[name][..., :8]], dim=3)[..., : case.head_dim]
    out, lse = _call(case, *(given | {name: odd}).values(), descales)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_no_key_at_all(device):
    case = replace(FULL, s_q=5, s_k=0, scales=("none", "none", "none"))
    out, lse = _call(case, *_bytes(case, device), {})
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"s_q": 0}, {"h_q": 0}, {"s_q": 0, "s_k": 0}], ids=str
)
def test_empty(sizes, device):
    case = replace(FULL, scales=("none", "none", "none"), **sizes)
    out, lse = _call(case, *_bytes(case, device), {})
    assert out.shape == (case.batch, case.s_q, case.h_q, case.head_dim_v)
    assert lse.shape == (case.batch, case.h_q, case.s_q)


def test_two_levels_of_accumulation(device):
    """In Hopper's accumulator of FP8, whose cuts add up over the keys where V has a mean."""
    case = replace(FULL, h_q=1, h_k=1, s_q=64, s_k=2048)
    q, k, v = (x.float() for x in _bytes(case, device))
    inputs = [x.to(torch.float8_e4m3fn) for x in (q, k, v + 4)]
    descales = case.descales(device)
    short = contextlib.nullcontext()
    if device.type == "cpu":
        short = fa3.emulator.options(accumulator="short")
    with short:
        out, _ = _call(case, *inputs, descales)
    attention = _exactly(case, *inputs, descales)
    exact = attention.exact(torch.float64)

    def error(x):
        return (x.cpu() - exact).square().mean().sqrt()

    limit = 1.5 * error(attention.baseline(torch.float32, 128, True))
    numerics = Numerics(is_short=True, is_two_level=False)
    one_level, _ = modelled((*inputs, *descales.values()), numerics=numerics)
    assert error(out) < limit
    assert error(one_level) > limit
