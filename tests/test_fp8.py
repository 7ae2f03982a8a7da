"""The forward kernel for one-byte inputs through flash_attn_func."""

import math
from dataclasses import replace

import pytest
import torch

import fa3
from fa3 import dispatch, tuning

from .accuracy import assert_accurate, assert_lse, assert_same_nonfinite
from .cases import Bordered
from .fp8_calls import values
from .fp8_cases import DTYPES, Fp8Case, covering
from .fp8_reference import Attention

# A statement about some thousand rows may not fail by chance: normal, 2e-9 of them are beyond.
DEVIATIONS = 6.0
# Errors that do not average out: of ex2.approx and lg2.approx, of roundings with a mean of their own.
LSE_FLOOR = 1e-3


def _call(case: Fp8Case, q, k, v, descales, out=None):
    """(out, lse) of a case."""
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
        out=out,
        **descales,
    )


def _out(case: Fp8Case, device) -> torch.Tensor:
    shape = case.batch, case.s_q, case.h_q, case.head_dim_v
    return torch.full(shape, math.nan, dtype=DTYPES[case.out], device=device)


def _exactly(case: Fp8Case, q, k, v, descales) -> Attention:
    """Of bytes times their scales, in fp64 on the CPU."""
    arrays = (
        values(x.cpu(), None if scale is None else scale.cpu(), form)
        for x, scale, form in zip(
            (q, k, v), (descales.get(f"{x}_descale") for x in "qkv"), case.scales, strict=True
        )
    )
    return Attention.of(*arrays, case.scale, **case.mask)


def _assert_follows(case: Fp8Case, given, lse, attention: Attention):
    """Both within what rounding P to e4m3 costs, bytes and scales taken as they are."""
    dtype, config = DTYPES[case.out], tuning.forward(case.signature)
    sums_rounded = not config.o_slice  # else O has no room for the rows of ones that sum P
    baseline = attention.baseline(dtype, config.tile_n, sums_rounded)
    assert_accurate("out", given.cpu(), attention.exact(dtype), baseline)
    if sums_rounded:
        _assert_lse_of_rounded(lse.cpu(), attention)
    else:
        assert_lse("lse", lse.cpu(), attention.lse.float())


def _assert_lse_of_rounded(lse, attention: Attention):
    assert lse.dtype == torch.float32
    assert_same_nonfinite("lse", lse, attention.lse)
    finite = attention.lse.isfinite()
    if not finite.any():
        return
    error = (lse.double() - attention.lse)[finite].abs()
    worst, deviation = (bound[finite] for bound in attention.lse_bounds())
    floor = 2.0**-15 * attention.lse[finite].abs().clamp(min=1)
    assert (error <= worst + floor).all()
    assert (error <= DEVIATIONS * deviation + LSE_FLOOR + floor).all()
    assert error.mean() <= deviation.mean() + LSE_FLOOR


def _check(case: Fp8Case, device) -> None:
    q, k, v = case.inputs(device)
    descales = case.descales(device)
    out = Bordered(_out(case, device), "bshd" if case.layout == "expanded" else case.layout)
    given, lse = _call(case, q.tensor, k.tensor, v.tensor, descales, out.tensor)
    assert given is out.tensor
    attention = _exactly(case, q.values, k.values, v.values, descales)
    _assert_follows(case, given, lse, attention)
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        x.assert_border_untouched(name)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_accuracy(case, device):
    _check(case, device)
