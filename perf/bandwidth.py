"""How fast `fa3.quantize_fp8` moves memory, beside a copy of as many bytes.

    python -m perf.bandwidth        16k tokens of hidden size 2048, by options and head dim

Bytes are those that must move: q, k and v read once, in bf16, and written once, with their scales.
Interleaved rounds with a cold L2, as in the sweep. Writes a CSV file. Needs a CUDA GPU; without one
it says so and does nothing else.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import timing
from .cases import HEAD_DIMS, Case
from .results import ROOT, Machine, write_csv

STEM = "quantize"  # beginning of the names of its CSV files
LENGTHS = (1024, 16_384)
OPTIONS = {  # and no smooth-V
    "block scales": {},
    "scales per head": {"block_scales": False},
    "hadamard": {"hadamard": True},
    "hadamard, smooth-K": {"hadamard": True, "smooth_k": True},
    "V per channel": {"v_per_channel": True},
}


@dataclass(frozen=True)
class Moved:
    """One call of quantize_fp8 on q, k and v of one shape (batch, length, heads, head_dim)."""

    options: str
    head_dim: int
    length: int
    batch: int
    heads: int
    ms: float | None = None  # median
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None  # of a copy among the same rounds
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.gb_per_s / self.copy_gb_per_s

    @property
    def of(self) -> str:
        return f"{self.options} d{self.head_dim} {self.length}"


def cases() -> list[Moved]:
    found = []
    for head_dim in HEAD_DIMS:
        for length in LENGTHS:
            b, s, h, d = Case.paper("bf16", head_dim, False, length).shape
            found += [Moved(options, d, s, b, h) for options in OPTIONS]
    return found


def measure(
    case: Moved, rounds: int, sample: timing.Sample, device: torch.device | str = "cuda"
) -> Moved:
    """Raises what the call raises."""
    import fa3

    torch.manual_seed(0)
    shape = case.batch, case.length, case.heads, case.head_dim
    qkv = [torch.randn(shape, device=device).bfloat16() for _ in range(3)]
    options = {"smooth_v": False, **OPTIONS[case.options]}
    outputs = fa3.quantize_fp8(*qkv, **options)
    moved = sum(x.numel() * x.element_size() for x in (*qkv, *outputs) if x is not None)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {
        "fa3": lambda: fa3.quantize_fp8(*qkv, **options),
        "copy": lambda: target.copy_(source),
    }
    times = timing.interleave(calls, rounds, sample)
    ours, copy = (statistics.median(times[name]) for name in ("fa3", "copy"))
    copied = 2 * source.numel()
    return replace(case, ms=ours, gb_per_s=moved / ours / 1e6, copy_gb_per_s=copied / copy / 1e6)


def summary(measured: list[tuple[Moved, Machine]]) -> str:
    """One line: the newest run as a share of the copy's rate."""
    rows, machine = newest(measured)
    if not rows:
        return f"{STEM}: not measured"
    ratios = [row.ratio for row in rows]
    mean, worst = statistics.geometric_mean(ratios), min(ratios)
    where = f"on {machine.device}, {machine.date[:10]}"
    return f"{STEM}: geomean {mean:.2f} worst {worst:.2f} of a copy over {len(rows)} rows {where}"


def newest(measured: list[tuple[Moved, Machine]]) -> tuple[list[Moved], Machine | None]:
    """The rows with a time of the last run that has any."""
    timed = [(row, machine) for row, machine in measured if row.ms is not None]
    last = max((machine for _, machine in timed), key=lambda machine: machine.date, default=None)
    return [row for row, machine in timed if machine == last], last


def main(argv: list[str] | None = None) -> int:
    from .progress import track
    from .sweep import WARM_UP_SECONDS, this_machine

    parser = argparse.ArgumentParser(
        "python -m perf.bandwidth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "out")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("perf.bandwidth: there is no CUDA GPU here, so nothing was measured or written.")
        return 0
    machine, sample = this_machine(), timing.GpuTimer()
    timing.warm_up(timing.matmul_call(torch.bfloat16)[0], WARM_UP_SECONDS)
    rows = []
    for case in track(cases(), "case"):
        rows.append(measure(case, options.rounds, sample))
        print(f"{rows[-1].of}: {rows[-1].gb_per_s:.0f} GB/s, {rows[-1].ratio:.1%} of a copy")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{STEM}-{machine.date.replace(':', '')}.csv"
    write_csv(path, rows, machine)
    print(f"{summary([(row, machine) for row in rows])}\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
