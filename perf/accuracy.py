"""Rewrite the tables of docs/accuracy.md: the error of FP8 attention, simulated on the CPU.

    python -m perf.accuracy            some minutes on one core; prints each row when it is known
    python -m perf.accuracy --check    leaves the document alone

tests/fp8_model.py stands for the kernel; tests/test_fp8_accuracy.py compares it with the kernel
itself, run by the emulator.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fa3.quantize import quantize_fp8
from tests.fp8_model import KERNEL, LARGEST, Numerics, attention

from .document import insert, lines_of_table
from .progress import end_with_reader
from .results import ROOT

DOCUMENT = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- begin: python -m perf.accuracy -->", "<!-- end -->"
HEAD_DIM = 128
# of data; every how many-th problem is enough: with outliers one differs much from the next
KINDS = {"outliers": 1, "key offset": 1, "normal": 3, "key and value offset": 3}
# keys (and queries) -> independent problems of one head, and how many of their queries are computed
LENGTHS = {384: (48, 128), 2048: (48, 128), 8192: (24, 96)}
FEW = 2, 64  # the same for the short accumulator, whose model is slow
SHORT, ONE_LEVEL = Numerics(is_short=True), Numerics(is_short=True, is_two_level=False)


@dataclass(frozen=True)
class Variant:
    """One way to compute attention in FP8: the options of quantize_fp8, and smooth-V beside it."""

    name: str = ""
    hadamard: bool = False
    smooth_k: bool = False
    block_scales: bool = False
    v_per_channel: bool = False
    qk_dtype: torch.dtype = torch.float8_e4m3fn
    smooth_v: bool = False

    def __str__(self) -> str:
        return self.name.strip("*")

    @property
    def options(self) -> dict:
        names = "hadamard", "smooth_k", "block_scales", "v_per_channel", "qk_dtype"
        return {"smooth_v": False, **{name: getattr(self, name) for name in names}}


E4M3 = Variant("**e4m3: all three**", True, True, True)
E4M3_SMOOTH_V = replace(E4M3, name="e4m3, smooth-V", smooth_v=True)
INT8 = replace(E4M3, name="**INT8 QK: all three**", qk_dtype=torch.int8)
INT8_SMOOTH_V = replace(INT8, name="INT8 QK, smooth-V", smooth_v=True)
VARIANTS = (
    Variant("one scale per head"),
    Variant("block scales", block_scales=True),
    Variant("Hadamard", hadamard=True),
    Variant("smooth-K", smooth_k=True),
    Variant("Hadamard, smooth-K", hadamard=True, smooth_k=True),
    E4M3,
    replace(E4M3, name="e4m3, V per channel", v_per_channel=True),
    E4M3_SMOOTH_V,
    Variant("INT8 QK, block scales", block_scales=True, qk_dtype=torch.int8),
    replace(INT8, name="INT8 QK, Hadamard, smooth-K", block_scales=False),
    INT8,
    INT8_SMOOTH_V,
)


@dataclass(frozen=True)
class Problem:
    """q, k, v (seeds, length, 1, head dim) in bf16, and the exact result of some queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor  # indices of those queries
    exact: Tensor  # (seeds, rows, 1, head dim) fp64

    @staticmethod
    def of(kind: str, length: int, seeds: int, num_rows: int) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        shape = seeds, length, 1, HEAD_DIM

        def normal(*size) -> Tensor:
            return torch.randn(size, generator=generator)

        def inputs() -> Tensor:
            x = normal(*shape)
            if kind in ("outliers", "key offset"):
                x += 10 * normal(*shape) * (torch.rand(shape, generator=generator) < 1e-3)
            return x

        q, k, v = (inputs() for _ in range(3))
        if kind in ("key offset", "key and value offset"):
            k += 3 * normal(seeds, 1, 1, HEAD_DIM)
        if kind == "key and value offset":
            v += 3 * normal(seeds, 1, 1, HEAD_DIM)
        q, k, v = (x.bfloat16() for x in (q, k, v))
        rows = torch.randperm(length, generator=generator)[:num_rows]
        S = _scores(q[:, rows].double(), k.double())
        exact = (S.softmax(-1) @ v.double().transpose(1, 2)).transpose(1, 2)
        return Problem(q, k, v, rows, exact)

    def error(self, out: Tensor) -> Tensor:
        """Root of the mean square error of each seed."""
        return (out.double() - self.exact).square().mean(dim=(1, 2, 3)).sqrt()


def plain_fp8(problem: Problem) -> Tensor:
    """All four tensors, P after its softmax included, in e4m3 with one scale each; else exact."""
    q, k, v = (_one_scale(x.float()) for x in (problem.q, problem.k, problem.v))
    P = _one_scale(_scores(q[:, problem.rows], k).softmax(-1))
    return (P @ v.transpose(1, 2)).transpose(1, 2)


def quantised(problem: Problem, variant: Variant, numerics: Numerics = KERNEL) -> Tensor:
    """What the kernel computes from inputs that quantize_fp8 made."""
    v, shift = problem.v, 0.0
    if variant.smooth_v:
        mean = v.float().mean(dim=1, keepdim=True)
        v = (v - mean).bfloat16()
    x = quantize_fp8(problem.q, problem.k, v, **variant.options)
    if variant.smooth_v:
        blocks = x.v_descale.repeat_interleave(128, dim=2)[:, :, : v.shape[1]]
        kept = x.v.float() * blocks.transpose(1, 2)[..., None]
        shift = mean + (problem.v - mean - kept).mean(dim=1, keepdim=True)
    return attention(x, rows=problem.rows, numerics=numerics)[0] + shift


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(b, rows, h, d), (b, s_k, h, d) -> (b, h, rows, s_k)"""
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * HEAD_DIM**-0.5


def _one_scale(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=(1, 2, 3), keepdim=True) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def ratio(error: Tensor, plain: Tensor) -> float:
    """Of the errors of all seeds together."""
    return math.sqrt(error.square().mean() / plain.square().mean())


def scatter(error: Tensor, plain: Tensor) -> float:
    """The standard error of that ratio, from the ratios of the seeds."""
    return (error / plain).std().item() / math.sqrt(len(error))


def main_rows(length: int):
    """Cells of a table: a row per variant, a column per kind of data."""
    seeds, rows = LENGTHS[length]
    problems = [Problem.of(kind, length, seeds // part, rows) for kind, part in KINDS.items()]
    plain = [p.error(plain_fp8(p)) for p in problems]
    yield "plain FP8, RMSE", *(f"{e.square().mean().sqrt():.1e}" for e in plain)
    for variant in VARIANTS:
        errors = [(p.error(quantised(p, variant)), e) for p, e in zip(problems, plain, strict=True)]
        yield variant.name, *(f"{ratio(*pair):.2f}" for pair in errors)
        if variant is E4M3:
            yield "its standard error", *(f"{scatter(*pair):.2f}" for pair in errors)


def accumulator_rows():
    """Cells of the table of accumulators: RMSE of the exact sum, two levels and one."""
    cases = [
        (kind, length, variant)
        for kind in ("normal", "key and value offset")
        for variant in (E4M3, E4M3_SMOOTH_V)
        for length in LENGTHS
    ]
    for kind, length, variant in cases:
        p = Problem.of(kind, length, *FEW)
        results = (quantised(p, variant, numerics) for numerics in (KERNEL, SHORT, ONE_LEVEL))
        errors = (p.error(out).square().mean().sqrt() for out in results)
        smooth = "yes" if variant.smooth_v else "no"
        yield kind, smooth, str(length), *(f"{error:.2e}" for error in errors)


def lines() -> Iterator[str]:
    """Of the document's tables, each as soon as it is known."""
    yield from (BEGIN, "", f"Computed with torch {torch.__version__}.", "")
    for length, (seeds, rows) in LENGTHS.items():
        yield from (f"### {length} keys ({seeds} problems, {rows} queries of each)", "")
        yield from lines_of_table(("", *KINDS), main_rows(length))
        yield ""
    yield from (f"### RMSE by accumulator ({FEW[0]} problems, {FEW[1]} queries of each)", "")
    columns = "data", "smooth-V", "keys", "exact sums", "short, two levels", "short, one level"
    yield from lines_of_table(columns, accumulator_rows())
    yield from ("", END)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    os.environ["FA3_CPU"] = "reference"  # quantise in plain torch
    found = []
    for line in lines():
        print(line, flush=True)
        found.append(line)
    if not options.check:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), "\n".join(found)))
        print(f"written: {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
