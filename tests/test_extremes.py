"""Scores of every size: the kernel and the CPU path against fp64.

A channel of q and k lifts whole groups of keys to a level.  A group at level 0 has ordinary scores
beside it; the keys of any other group have that level as their one score, so that fp32, in which
every implementation sums it, holds it without doubt.  A softmax must then weigh the keys of the
highest group against each other as if there were no others.
"""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

import fa3

from . import reference
from .accuracy import assert_accurate, assert_lse, assert_same_nonfinite
from .fp8_reference import Attention

GROUP = 64  # keys with one level
HUGE = 1e9
SCALE = 0.5
E4M3 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Levels of groups of keys; the kernel visits them from the last to the first.
LEVELS = {
    "hidden, ordinary": (0, -HUGE),
    "ordinary, hidden": (-HUGE, 0),
    "hidden on both sides": (-HUGE, -HUGE, 0, 0, -HUGE),
    "all hidden alike": (-HUGE,) * 6,
    "all huge alike": (HUGE,) * 6,
    "ordinary before equal huge ones": (HUGE, HUGE, HUGE, HUGE, 0),
    "rising": (HUGE, 1e6, 1e5, 3e3, 100, 0, -100, -3e3, -1e5, -HUGE),
    "falling": (-HUGE, -1e5, -3e3, -100, 0, 100, 3e3, 1e5, 1e6, HUGE),
    "far, near, far, near": (0, 0, -1e4, -1e4, -20, -20, -HUGE, -HUGE),
    "around the largest shift": (0, -2700, -2800, -2830, -2840, -2850, -2900, -3000),
    "one of all": (0, 30, -30, 0, 30, 30, -3e3, 5e3, -HUGE, 5e3),
    "as large as fp32": (0, -2e38, 0, -2e38, -2e38),
}


@dataclass(frozen=True)
class Case:
    levels: str
    dtype: str
    mask: str
    head_dim: int
    softcap: float = 0.0
    sink: float | None = None

    def __str__(self) -> str:
        more = f"cap {self.softcap} " * (self.softcap > 0) + "sink " * (self.sink is not None)
        return f"{self.dtype} {self.mask} {self.head_dim} {more}{self.levels}"

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    def inputs(self, device) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """q, k and v for 160 queries, and the descales that they need."""
        levels = torch.tensor(LEVELS[self.levels], dtype=torch.float64) / SCALE
        of_keys = levels.repeat_interleave(GROUP)
        lengths = (160, len(of_keys), len(of_keys))
        q, k, v = (torch.randn(1, length, 1, self.head_dim) for length in lengths)
        k[:, of_keys != 0] = 0.0
        if self.dtype == "e4m3":  # the sign in the key, the size in its scale
            q[..., 0], k[..., 0] = 1.0, of_keys.sign()[None, :, None]
            k_descale = levels.abs().where(levels != 0, 1.0).float()[None, None]
            return [x.to(E4M3).to(device) for x in (q, k, v)], {"k_descale": k_descale.to(device)}
        dtype = DTYPES[self.dtype]
        of_q = 2.0 ** max(0, math.ceil(math.log2(levels.abs().max() / torch.finfo(dtype).max)))
        q[..., 0], k[..., 0] = of_q, (of_keys / of_q)[None, :, None]
        return [x.to(device, dtype) for x in (q, k, v)], {}


def _cases() -> list[Case]:
    """Every level in every dtype where it fits; masks and head dims in turn."""
    turns = {
        "bf16": itertools.cycle([("full", 64), ("causal", 64), ("causal", 128), ("full", 128)]),
        "fp16": itertools.cycle([("full", 64)]),
        "e4m3": itertools.cycle([("full", 64), ("causal", 128)]),
    }
    found = [(levels, dtype) for levels in LEVELS for dtype in turns]
    fits = [x for x in found if x[1] == "bf16" or "as large" not in x[0]]
    return [Case(*x, *next(turns[x[1]])) for x in fits] + [
        Case(levels, ("bf16", "e4m3")[(i + j) % 2 * ("as large" not in levels)], "full", 64, *score)
        for i, levels in enumerate(LEVELS)
        for j, score in enumerate([(20.0,), (0.0, 1.0)])
    ]


def _compare(case: Case, device, is_kernel: bool):
    (q, k, v), descales = case.inputs(device)
    options = {"softmax_scale": SCALE, "causal": case.causal, "softcap": case.softcap}
    sink = None if case.sink is None else torch.tensor([case.sink], device=device)
    out, lse = fa3.flash_attn_func(
        q, k, v, **options, **descales, learnable_sink=sink, return_attn_probs=True
    )
    more = {"softcap": case.softcap, "sink": None if sink is None else sink.cpu()}
    q, k, v, out, lse = (x.cpu() for x in (q, k, v, out, lse))
    if case.dtype != "e4m3":
        _assert_follows(q, k, v, out, lse, SCALE, case.causal, **more)
        return
    k = k.double() * descales["k_descale"].cpu().repeat_interleave(GROUP, 2)[0, 0, :, None, None]
    attention = Attention.of(q.double(), k, v.double(), SCALE, case.causal, **more)
    baseline = attention.baseline(torch.bfloat16, 128, sums_rounded=True)
    assert_accurate("out", out, attention.exact(torch.bfloat16), baseline)
    assert_same_nonfinite("lse", lse, attention.lse)
    finite = lse.isfinite()
    bound = attention.lse_bounds()[0][finite] if is_kernel else 0.0
    exact_lse = attention.lse[finite]
    error = (lse[finite].double() - exact_lse).abs()
    assert (error <= bound + 2.0**-15 * exact_lse.abs().clamp(min=1)).all()


def _assert_follows(q, k, v, out, lse, scale, causal=False, **more):  # noqa: PLR0913
    """Within twice what rounding P costs; scores in the inputs' dtype, as torch's, overflow."""
    exact, exact_lse = reference.exact(q, k, v, scale, causal, precision=torch.float64, **more)
    attention = Attention.of(q.double(), k.double(), v.double(), scale, causal, **more)
    p = attention.y.exp2().to(q.dtype).double()
    baseline = attention.normalised(p @ attention.v, p.sum(-1, keepdim=True), q.dtype)
    assert_accurate("out", out, exact, baseline)
    assert_lse("lse", lse, exact_lse.float())


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_levels(case, device):
    _compare(case, device, is_kernel=True)


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_levels_on_the_cpu_path(case, plain_torch):
    _compare(case, torch.device("cpu"), is_kernel=False)


def _random(dtype, size, device):
    """Scores of about this size, v all ones."""
    q, k = (torch.randn(1, s, 2, 64) * size**0.5 / 2 for s in (130, 700))
    v = torch.ones(1, 700, 2, 64)
    return [x.to(device, dtype) for x in (q, k, v)]


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e3, 1e5, 1e8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_add_up_to_one(dtype, size, device):
    """However large the scores, and however they change from key to key."""
    out = fa3.flash_attn_func(*_random(dtype, size, device))
    assert (out.float() - 1).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e3, 1e5, 1e8])
def test_weights_add_up_to_one_on_the_cpu_path(size, plain_torch):
    out = fa3.flash_attn_func(*_random(torch.float16, size, "cpu"))
    assert (out.float() - 1).abs().max() <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("value", [5000.0, -5000.0])
def test_equal_huge_scores_give_the_mean(value, device):
    q, v = torch.full((1, 70, 1, 64), 5000.0), torch.randn(1, 600, 1, 64)
    k = torch.full_like(v, value)
    q, k, v = (x.half().to(device) for x in (q, k, v))
    out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    mean = v.float().mean(1, keepdim=True)
    assert (out.float() - mean).abs().max() <= 2 * 2.0**-11 * mean.abs().max()
    torch.testing.assert_close(lse, torch.full_like(lse, 5000 * value * 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", [0, 300, 699])
def test_one_huge_key_takes_it_all(place, device):
    q, k, v = _random(torch.bfloat16, 1.0, device)
    v = torch.randn_like(v)
    q[..., 0], k[..., 0], k[:, place, :, 0] = 1.0, 0.0, 1e9
    out = fa3.flash_attn_func(q, k, v)
    assert torch.equal(out, v[:, place : place + 1].expand_as(out))


@pytest.mark.parametrize("softmax_scale", [2.0**-120, 1e-12, 1e12, 1e30])
def test_scales_of_every_size(softmax_scale, device):
    """A tiny one gives the mean of v, a huge one the v of the largest score."""
    q, k, v = _random(torch.bfloat16, 1.0, device)
    v = torch.randn_like(v)
    out, lse = fa3.flash_attn_func(q, k, v, softmax_scale, return_attn_probs=True)
    _assert_follows(*(x.cpu() for x in (q, k, v, out, lse)), softmax_scale)


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_the_kernel_and_the_cpu_path_agree_on_what_is_not_finite(name, value, device):
    """One bad element among levels: the same results are NaN, the others are right."""
    q, k, v = _random(torch.bfloat16, 1.0, "cpu")
    v = torch.randn_like(v)
    q[..., 0], k[:, :350, :, 0], k[:, 350:, :, 0] = 1.0, 0.0, -1e9
    {"q": q, "k": k}[name][0, 77, 1, 3] = value
    wanted, wanted_lse = reference.exact(q, k, v, causal=True)
    out, lse = fa3.flash_attn_func(
        *(x.to(device) for x in (q, k, v)), causal=True, return_attn_probs=True
    )
    assert_same_nonfinite("out", out.cpu(), wanted)
    finite = wanted.isfinite()
    assert finite.any()
    torch.testing.assert_close(out.cpu()[finite], wanted[finite], atol=2e-2, rtol=0)
    finite = wanted_lse.isfinite()
    torch.testing.assert_close(lse.cpu()[finite], wanted_lse[finite])
