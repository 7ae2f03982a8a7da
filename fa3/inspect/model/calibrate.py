"""Fit the model's contention constants and clock to measured speeds.

    python -m fa3.inspect.model.calibrate TABLE [--fit]

TABLE is tab-separated, with # for comments:

    label    cubin    kernel    consumers    tail    TFLOPs/s    role

`cubin` is relative to the table; `kernel` its full name or empty; role is "fit" (chooses the
constants) or "test" (only predicted). Without --fit the rival constants are compared.
"""

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..report import analyse
from .machine import RIVALS, Machine
from .predict import Settings, tflops, traces_of
from .simulate import simulate
from .trace import Trace

STEALS = (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.85, 1.0)
SLOWS = (0.0, 0.4, 0.8, 1.2, 1.6)
ITERATIONS = 24
SHOWN = 12


@dataclass(frozen=True)
class Case:
    """A kernel whose speed was measured."""

    label: str
    traces: list[Trace]
    tail: float
    measured: float  # TFLOPs/s
    fits: bool  # else it is only predicted


@dataclass(frozen=True)
class Fit:
    """Two constants, and the clock that suits the cases best with them."""

    error: float  # root mean square of the relative errors of the fitted cases
    steal: float
    slow: float
    clock: float  # GHz
    predicted: list[float]  # TFLOPs/s of each case


def read(table: Path) -> list[Case]:
    cases = []
    for line in table.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            label, cubin, kernel, consumers, tail, measured, role = line.split("\t")
            report = analyse((table.parent / cubin).read_bytes(), kernel or None)
            traces = traces_of(report, Settings(consumers=int(consumers)))
            cases.append(Case(label, traces, float(tail), float(measured), role == "fit"))
    if not any(case.fits for case in cases):
        raise ValueError(f"{table} has no case with the role 'fit'")
    return cases


def evaluate(cases: list[Case], steal: float, slow: float) -> Fit:
    machine = Machine(steal=steal, slow=slow)
    per_ghz = [tflops(simulate(c.traces, machine, ITERATIONS), 1.0, c.tail) for c in cases]
    logs = [math.log(c.measured / r) for c, r in zip(cases, per_ghz, strict=True) if c.fits]
    mean = sum(logs) / len(logs)
    error = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
    clock = math.exp(mean)
    return Fit(error, steal, slow, clock, [rate * clock for rate in per_ghz])


def fit(cases: list[Case], grid: list[tuple[float, float]]) -> list[Fit]:
    """Best first."""
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(evaluate, cases, steal, slow) for steal, slow in grid]
        return sorted((job.result() for job in jobs), key=lambda f: f.error)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m fa3.inspect.model.calibrate", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("table", type=Path)
    p.add_argument("--fit", action="store_true", help="search the whole grid (minutes)")
    args = p.parse_args(argv)
    cases = read(args.table)
    grid = [(a, b) for a in STEALS for b in SLOWS] if args.fit else [r[:2] for r in RIVALS]
    fits = fit(cases, grid)
    for f in fits[:SHOWN]:
        print(f"steal {f.steal:.2f}  slow {f.slow:.2f}  clock {f.clock:.3f} GHz  "
              f"rms error {f.error:.1%}")  # fmt: skip
    ours = Machine()
    best = fits[0] if args.fit else next(f for f in fits if f.steal == ours.steal)
    print(f"\nsteal {best.steal:.2f}, slow {best.slow:.2f}, clock {best.clock:.3f}:")
    for case, rate in zip(cases, best.predicted, strict=True):
        role = "fit" if case.fits else "test"
        print(f"  {role:5}{case.label:32} predicted {rate:5.0f}  measured {case.measured:5.0f}  "
              f"{rate / case.measured - 1:+.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
