"""How fast the emulator is: warpgroup instructions per second and core, by case and checks.

    python -m perf.emulator            prints a table, some minutes

Every case is called once to compile and lower it, then --rounds times with one process and as often
with two; the best counts. Instructions per second are of the CPU time with one process, the wall
times are those of the whole call. A numpy operation is timed with them: it tells how fast the
machine was meanwhile. Needs no GPU.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .document import table

LENGTH = 2048
SHAPE = (1, LENGTH, 2, 128)  # b, s, h, d
COLUMNS = (
    "case",
    "checks",
    "instructions",
    "CPU s",
    "million per s and core",
    "wall s, 1 process",
    "wall s, 2 processes",
)


@dataclass(frozen=True)
class Speed:
    """The best of several calls."""

    instructions: int  # of warpgroups
    cpu: float  # seconds, in one process
    wall: float
    wall_of_two: float

    @property
    def cells(self) -> tuple[str, ...]:
        millions = self.instructions / self.cpu / 1e6
        times = f"{self.wall:.2f}", f"{self.wall_of_two:.2f}"
        return f"{self.instructions}", f"{self.cpu:.2f}", f"{millions:.3f}", *times


def cases() -> dict[str, Callable[[], object]]:
    import fa3

    torch.manual_seed(0)
    q, k, v = (torch.randn(SHAPE).bfloat16() for _ in range(3))
    x = fa3.quantize_fp8(q, k, v, smooth_v=False)
    return {
        "forward bf16, causal": lambda: fa3.flash_attn_func(q, k, v, causal=True),
        "forward e4m3, causal": lambda: fa3.flash_attn_func(*x[:3], causal=True, **x.scales),
        "quantize_fp8": lambda: fa3.quantize_fp8(q, k, v, smooth_v=False),
    }


def levels() -> dict[str, tuple[str, ...]]:
    from fa3.emulator import ALL_CHECKS

    return {
        "none": (),
        "all but race, global": tuple(c for c in ALL_CHECKS if c not in ("race", "global")),
        "all": ALL_CHECKS,
    }


def _once(call: Callable[[], object], checks: tuple[str, ...], processes: int):
    """(instructions, CPU seconds, wall seconds)"""
    from fa3 import emulator

    before = len(emulator.launches)
    with emulator.options(checks=checks, processes=processes):
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return sum(x["instructions"] for x in emulator.launches[before:]), cpu, wall


def measured(call: Callable[[], object], checks: tuple[str, ...], rounds: int) -> Speed:
    _once(call, checks, 1)
    alone = [_once(call, checks, 1) for _ in range(rounds)]
    two = [_once(call, checks, 2) for _ in range(rounds)]
    instructions, cpu, wall = (min(column) for column in zip(*alone, strict=True))
    return Speed(instructions, cpu, wall, min(x[2] for x in two))


def numpy_microseconds() -> float:
    """CPU time of adding two rows of 128 floats, best of many."""
    a, b, out = np.ones((3, 128), np.float32)
    times = []
    for _ in range(50):
        start = time.process_time()
        for _ in range(10_000):
            np.add(a, b, out=out)
        times.append((time.process_time() - start) / 10_000)
    return 1e6 * min(times)


def machine() -> str:
    """CPU, versions, date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return (
        f"{datetime.date.today()}: {next(names, platform.machine())}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
        f"no GPU; one np.add of 128 floats took {numpy_microseconds():.2f} us of CPU time"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.emulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    os.environ["FA3_CPU"] = "emulate"
    rows = [
        (case, checks, *measured(call, on, options.rounds).cells)
        for case, call in cases().items()
        for checks, on in levels().items()
    ]
    print(f"{machine()}\n\n{table(COLUMNS, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
