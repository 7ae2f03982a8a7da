"""The error of FP8 attention: a model of the kernel against goals, the kernel against the model.

docs/accuracy.md has the same figures for more data and for longer rows.
"""

import contextlib
import functools
from dataclasses import dataclass, field, replace

import pytest
import torch

import fa3
from fa3.launch import dispatch, tuning
from fa3.quantize import Fp8Inputs, quantize_fp8
from perf import accuracy
from perf.accuracy import E4M3, E4M3_SMOOTH_V, INT8, INT8_SMOOTH_V, Problem, Variant

from . import fp8_model
from .fp8_model import Numerics

LENGTH, ROWS = 2048, 96
SEEDS = {"outliers": 24, "key offset": 24, "normal": 3, "key and value offset": 3}
# RMSE over that of plain FP8 at 2048 keys: without smooth-V what a simulation of perfect kernels
# reached for the issue that asked for FP8, with it what the model of this one did.
GOALS = {
    ("outliers", E4M3): 0.49,
    ("key offset", E4M3): 0.45,
    ("normal", E4M3): 0.98,
    ("outliers", INT8): 0.33,
    ("key offset", INT8): 0.27,
    ("normal", INT8): 0.72,
    ("normal", E4M3_SMOOTH_V): 0.93,
    ("normal", INT8_SMOOTH_V): 0.65,
    ("key and value offset", E4M3_SMOOTH_V): 0.30,
    ("key and value offset", INT8_SMOOTH_V): 0.22,
}
# What a maximum costs that moves only when a score exceeds it 7-fold: the largest P of a row is
# exact in e4m3 where it is a power of two.
MOVING = 0.025


@contextlib.contextmanager
def quantising_in_torch():
    """The kernel of quantize_fp8 has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        target = dispatch.Target("reference", "CPU", (0, 0), 1)
        patch.setattr(dispatch, "target_of", lambda device: target)
        yield


@functools.cache
def problem(kind: str) -> Problem:
    return Problem.of(kind, LENGTH, SEEDS[kind], ROWS)


@functools.cache
def plain_error(kind: str) -> torch.Tensor:
    p = problem(kind)
    return p.error(accuracy.plain_fp8(p))


@functools.cache
def ratio(kind: str, variant: Variant) -> tuple[float, float]:
    """RMSE over that of plain FP8, and its standard error."""
    p = problem(kind)
    with quantising_in_torch():
        error = p.error(accuracy.quantised(p, variant))
    plain = plain_error(kind)
    return accuracy.ratio(error, plain), accuracy.scatter(error, plain)


def rmse(p: Problem, variant: Variant, numerics: Numerics) -> float:
    with quantising_in_torch():
        out = accuracy.quantised(p, variant, numerics)
    return p.error(out).square().mean().sqrt().item()


@pytest.mark.parametrize(("kind", "variant"), GOALS, ids=str)
def test_goals(kind, variant):
    """Reached, as far as so few problems can tell: with outliers one differs much from the next."""
    found, scatter = ratio(kind, variant)
    goal = GOALS[kind, variant]
    limit = goal + 2 * scatter + MOVING
    assert found <= limit, f"{found:.3f} +- {scatter:.3f}, the goal is {goal}"


@pytest.mark.parametrize(
    ("better", "worse", "kind"),
    [
        (Variant("Hadamard", hadamard=True), Variant("none"), "outliers"),
        (E4M3, replace(E4M3, name="no smooth-K", smooth_k=False), "key offset"),
        (INT8, E4M3, "normal"),
        (E4M3_SMOOTH_V, E4M3, "key and value offset"),
    ],
    ids=str,
)
def test_options_help_where_they_should(better, worse, kind):
    assert ratio(kind, better)[0] < 0.9 * ratio(kind, worse)[0]


def test_two_levels_against_one():
    """In the short accumulator, whose cuts add up where V has a mean; smooth-V takes it away."""
    p = Problem.of("key and value offset", LENGTH, 1, 32)
    short, one_level = Numerics(is_short=True), Numerics(is_short=True, is_two_level=False)
    two_levels = rmse(p, E4M3, short)
    assert two_levels < 1.5 * rmse(p, E4M3, Numerics())
    assert rmse(p, E4M3, one_level) > 5 * two_levels
    assert rmse(p, E4M3_SMOOTH_V, one_level) < 1.1 * rmse(p, E4M3_SMOOTH_V, short)


def test_maxima_start_at_powers_of_two():
    """A row that looks at one key has one P, which e4m3 must hold as it is."""
    p = problem("outliers")
    start = Numerics().limit - Numerics().headroom
    assert start == int(start)
    between = Numerics(headroom=Numerics().headroom + 0.25)
    assert rmse(p, INT8, between) > 1.05 * rmse(p, INT8, Numerics())


def test_document_has_every_variant():
    """What perf.accuracy would write today has the lines that it once wrote."""
    text = accuracy.DOCUMENT.read_text()
    tables = text.partition(accuracy.BEGIN)[2].partition(accuracy.END)[0]
    for variant in accuracy.VARIANTS:
        assert tables.count(f"| {variant.name} |") == len(accuracy.LENGTHS), variant


@dataclass(frozen=True)
class Case:
    """A kernel, and a call of it."""

    name: str
    options: dict  # of quantize_fp8
    mask: dict = field(default_factory=dict)  # of the call
    shape: tuple[int, ...] = (1, 256, 384, 2, 1)  # b, s_q, s_k, h_q, h_k

    def __str__(self) -> str:
        return self.name

    def inputs(self) -> Fp8Inputs:
        b, s_q, s_k, h_q, h_k = self.shape
        q, k, v = (
            (torch.randn(b, s, h, 128) + mean).bfloat16()
            for s, h, mean in ((s_q, h_q, 0.0), (s_k, h_k, 1.0), (s_k, h_k, 1.0))
        )
        with quantising_in_torch():
            return quantize_fp8(q, k, v, **{"smooth_v": False, **self.options})


SPREAD = {"hadamard": True, "smooth_k": True}
CASES = (
    Case("e4m3, causal", SPREAD, {"causal": True}, (2, 140, 384, 2, 1)),
    Case("int8", SPREAD | {"qk_dtype": torch.int8}),
)


@pytest.mark.parametrize("accumulator", ["fp32", "short"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_follows_model(case, accumulator, device):
    """But for P beside a rounding tie, which may go the other way: one key of one row then counts
    up to 2^-4 of its weight more or less.
    """
    if device.type == "cuda" and accumulator == "fp32":
        pytest.skip("a GPU has the short accumulator")
    inputs = case.inputs()
    config = tuning.FORWARD_FP8[128, 128]["any"]
    numerics = Numerics(
        tile_n=config.tile_n, sums_rounded=not config.o_slice, is_short=accumulator == "short"
    )
    expected, lse = fp8_model.attention(inputs, numerics=numerics, **case.mask)
    x = Fp8Inputs(*(t if t is None else t.to(device) for t in inputs))
    on_emulator = device.type == "cpu"
    how = fa3.emulator.options(accumulator=accumulator) if on_emulator else contextlib.nullcontext()
    with how:
        out, found_lse = fa3.flash_attn_func(
            *x[:3],
            q_descale=x.q_descale,
            k_descale=x.k_descale,
            v_descale=x.v_descale,
            out=torch.empty_like(expected, device=device),
            return_attn_probs=True,
            **case.mask,
        )
    for actual, model in ((out.cpu(), expected), (found_lse.cpu(), lse)):
        difference = (actual - model).abs()
        assert (difference > 1e-5).float().mean() < 0.1
        assert difference.max() < 2.0**-4 * model.abs().max()
