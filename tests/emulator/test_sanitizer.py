"""The checks on CuTe DSL kernels: each has bugs that it must find and name the lines of.

A row is a switch of a kernel.  Without the switch the kernel is correct: it must pass all checks
under every schedule.  The exact rules are tested on PTX, in test_bugs.py and test_races.py.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch

from .test_checks import line_of

TILES = 9  # of the ring: as many as it takes for a surplus arrival to overtake the producer


class WrongResult(AssertionError):
    """What the kernel computed differs from what it should have."""


class Bug(NamedTuple):
    """checks are those that are on; lines (function, text) must all be named, .source the first."""

    kernel: str
    broken: str
    checks: str
    error: str
    message: str = ""
    lines: tuple[tuple[str, str], ...] = ()


DOUBLED = "_double", "* cutlass.Float16(2)"
EXPECTED = "_produce", "mbarrier_arrive_and_expect_tx"
INITIALISED = "Ring", "mbarrier_init(self.empty + stage"
LOADED = "_produce", "cute.copy(load"
MULTIPLIED = "_multiply", "cute.gemm("
FETCHED = "_fetch", "a_regs.store("
STORED = "_store", "cute.copy(store"
WRITTEN = "_consume", "mine[j] = acc[j]"
EMPTY = "_produce", "mbarrier_wait(ring.empty + stage, phase ^ 1)"
FULL = "_await_tile", "mbarrier_wait(ring.full + stage, phase)"

RING = [
    # the async proxy
    ("operand fence", "proxy", "MissingProxyFence", "operand B reads .* by thread", MULTIPLIED),
    ("store fence", "proxy", "MissingProxyFence", "TMA store reads .* by thread 0, ", STORED),
    ("init fence", "proxy", "MissingProxyFence", "completes bytes at the mbarrier at 0x0", LOADED),
    ("tile too many", "box", "OutOfBounds", r"zeros alone: in phase 4 .* at \[0, 144\]", LOADED),
    # memory in use
    ("operand barrier", "race", "Race", "wgmma .* reads .* write by warp", MULTIPLIED, DOUBLED),
    ("store barrier", "race", "Race", "TMA store .* reads .* the write by warp", STORED, WRITTEN),
    ("early release", "race", "Race", "TMA load .* the read by wgmma", LOADED, MULTIPLIED),
    ("store wait", "race", "Race", "warp 0 writes .* the read by TMA store", WRITTEN, STORED),
    ("wait barrier", "race", "Race", "writes .* the read by TMA store", WRITTEN, STORED),
    ("consumer wait", "race", "Race", "warp 0 reads .* no wait on its mbarrier", DOUBLED, LOADED),
    ("lap", "race", "Race", "TMA load .* the write by TMA load", LOADED),
    ("exit", "race", "Race", "thread 0 exits while its bulk store may still read"),
    ("init barrier", "race", "Race", "warp 4 uses the mbarrier", EMPTY, INITIALISED),
    ("consumer wait", "uninit late", "Uninitialized", "ld reads uninitialised shared", DOUBLED),
    ("consumer phase", "uninit late", "Uninitialized", "ld reads uninitialised shared", DOUBLED),
    # registers of wgmma
    ("wait group", "wgmma", "RegisterInFlight", "accumulator .* used while", WRITTEN),
    ("early next a", "wgmma", "RegisterInFlight", "A operand .* overwritten while", FETCHED),
    ("wgmma fence", "fence", "MissingWgmmaFence", "no wgmma.fence before it", MULTIPLIED),
    ("accumulate", "poison", "WrongResult"),
    ("accumulate", "uninit", "Uninitialized", "use register .* not written", MULTIPLIED),
    # schedules
    ("wait group", "late", "WrongResult"),
    ("wait group", "", "ScheduleDifference", "wgmma of CTA", MULTIPLIED),
    ("store wait", "", "ScheduleDifference", "ordinary accesses .* are suspect"),
    # mbarriers
    ("bytes too many", "", "Deadlock", "parity 0 .* 576 bytes expected, 512 came", FULL),
    ("bytes too few", "", "Deadlock", "parity 0 .* 448 bytes expected, 512 came", FULL),
    ("producer phase", "", "Deadlock", r"mbarrier 0x10 \(barriers\) parity 0 \(phase 0, 4 of 4"),
    ("consumer phase", "", "Deadlock", r"mbarrier 0x0 \(barriers\) parity 1 \(phase 1, 1 of 1"),
    ("no release", "", "Deadlock", r"mbarrier 0x10 \(barriers\) parity 0 \(phase 0, 4 of 4", EMPTY),
    ("too few arrivals", "", "Deadlock", r"0x10 \(barriers\) parity 0 \(phase 0, 1 of 5", EMPTY),
    ("too many arrivals", "mbarrier", "BarrierMisuse", "a phase was overrun", EMPTY),
    ("lap", "late", "BarrierMisuse", "more arrivals than its count of 1", EXPECTED),
    ("second init", "mbarrier", "BarrierMisuse", "initialised again", ("Ring", "(self.full, 1)")),
    ("overlap", "mbarrier", "BarrierMisuse", "ordinary store over the mbarrier", WRITTEN),
]  # fmt: skip

MET = "_meet", "number_of_threads=2 * THREADS)"
HALF = "_meet", "number_of_threads=THREADS // 2)"
COUNT = "_meet", "number_of_threads=count)"
ADDED = "_add", "total[0] = total[0] + value"
LOCKED = "_add", "while cute.arch.atomic_cas"
FILLED = "_total", "sums[t] = x[mine]"
SUMMED = "_total", "sums[other]"
ADDED_UP = "_total", "result + sums[i]"

TOTAL = [
    # named barriers
    ("barrier for too many", "", "Deadlock", "barrier 1: 128 of 256 threads arrived", MET),
    ("barrier for too few", "", "BarrierMisuse", "96 threads arrived where 64 were", HALF),
    ("disagreement", "", "BarrierMisuse", "participants disagree on the thread count", COUNT),
    # memory
    ("no barrier", "race", "Race", "warp 0 reads .* the write by warp 1", SUMMED, FILLED),
    ("no warp barrier", "race", "Race", "lane 0 .* reads .* lane 1 .* wrote", ADDED_UP, SUMMED),
    ("not locked", "global", "Race", "cluster 1 .* no atomic leads from one", ADDED),
    ("not written", "uninit", "Uninitialized", "ld reads uninitialised .* 0x180", SUMMED),
    ("outside of x", "", "OutOfBounds", "global read at .* outside every registered", FILLED),
    ("outside of sums", "", "OutOfBounds", "shared access at .* outside the CTA's 0x200", SUMMED),
    # control
    ("not unlocked", "", "Runaway", "an endless loop", LOCKED),
]
MIRROR = [
    ("no wait", "race", "Race", "no cp.async.wait_group of its warp", ("_mirror", "out[")),
    ("no wait", "late", "WrongResult"),
    ("misaligned", "", "Misaligned", "16", ("_mirror", "cute.copy(atom")),
]  # fmt: skip
REGISTERS = [
    ("too many", "", "Deadlock", "9216 registers more, 8192 are free", ("_registers", "(240)")),
    ("more", "", "KernelError", "setmaxnreg.dec to 240 of warps that", ("_registers", "(keep)")),
]  # fmt: skip

BUGS = [
    Bug(kernel, *row[:4], lines=row[4:])
    for kernel, rows in {
        "ring": RING, "total": TOTAL, "mirror": MIRROR, "registers": REGISTERS
    }.items()
    for row in rows
]  # fmt: skip
# of those that a check is for, what shows without it: in the result or as a deadlock
VISIBLE = {
    "accumulate",
    "not written",
    "consumer phase",
    "consumer wait",
    "lap",
    "too many arrivals",
}
HIDDEN = sorted({(b.kernel, b.broken) for b in BUGS if b.checks and b.broken not in VISIBLE})
KERNELS = sorted({bug.kernel for bug in BUGS})
FILES = {"ring": "ring_kernel"}  # of the others: broken_kernels


def tensors(kernel: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Arguments, of which the last is the output, and what it should become."""
    x = torch.arange(512, dtype=torch.int32)
    if kernel == "ring":
        a, b = torch.randint(-3, 4, (2, TILES, 64, 16)).half()
        b = b[:, :16]
        out = torch.zeros(TILES * 64, 16).half()
        return [a.reshape(-1, 16), b.reshape(-1, 16), out], (a @ (2 * b).mT).reshape(-1, 16)
    if kernel == "total":
        lock, total = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
        return [x, lock, total], x.sum(dtype=torch.int32)[None]
    if kernel == "mirror":
        return [x, torch.zeros_like(x)], x.flip(0)
    return [torch.zeros(384, dtype=torch.int32)], torch.arange(384, dtype=torch.int32)


@pytest.fixture
def launch(emulator, compiled):
    """launch(kernel, broken) -> (output, what it should be)"""

    def run(kernel, broken=""):
        file = importlib.import_module(f"..{FILES.get(kernel, 'broken_kernels')}", __name__)
        arguments, expected = tensors(kernel)
        function = compiled(getattr(file, kernel), *arguments, broken=broken)
        with emulator.options(instruction_limit=20_000):
            function(*arguments)
        return arguments[-1], expected

    return run


def require_right(launch, kernel, broken=""):
    result, expected = launch(kernel, broken)
    if not torch.equal(result, expected):
        raise WrongResult(f"{int((result != expected).sum())} elements differ")


def error_of(emulator, name: str):
    return WrongResult if name == "WrongResult" else getattr(emulator, name)


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: f"{b.kernel}, {b.broken}, {b.checks or '-'}")
def test_a_bug_is_found_and_its_lines_are_named(emulator, launch, bug):
    error = error_of(emulator, bug.error)
    with emulator.options(checks=tuple(bug.checks.split())):
        with pytest.raises(error, match=f"(?s){bug.message}") as found:
            if bug.error == "ScheduleDifference":
                emulator.compare_schedules(lambda: launch(bug.kernel, bug.broken)[:1])
            require_right(launch, bug.kernel, bug.broken)
    file = FILES.get(bug.kernel, "broken_kernels")
    assert type(found.value) is error
    for line in bug.lines:
        assert line_of(*line, file) in str(found.value)
    if getattr(found.value, "source", "") and bug.lines:
        assert found.value.source.endswith(line_of(*bug.lines[0], file))


@pytest.mark.parametrize("kernel, broken", dict.fromkeys((b.kernel, b.broken) for b in BUGS))
def test_all_checks_together_find_it_too(emulator, launch, kernel, broken):
    with emulator.options(checks=emulator.ALL_CHECKS):
        with pytest.raises((emulator.KernelError, WrongResult)):
            require_right(launch, kernel, broken)


@pytest.mark.parametrize("kernel, broken", HIDDEN)
def test_without_its_check_a_bug_stays_hidden(emulator, launch, kernel, broken):
    """As on a GPU, most of the time: the result is right."""
    with emulator.options(checks=()):
        require_right(launch, kernel, broken)


@pytest.mark.parametrize("schedule", ["eager", "late", "random"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_without_the_bug_passes_all_checks(emulator, launch, kernel, schedule):
    with emulator.options(checks=emulator.ALL_CHECKS, schedule=schedule, seed=7):
        require_right(launch, kernel)


def test_every_check_and_every_error_has_a_bug(emulator):
    assert {check for bug in BUGS for check in bug.checks.split()} == set(emulator.ALL_CHECKS)
    errors, found = [emulator.KernelError], set()
    while errors:
        found.add(errors[-1].__name__)
        errors += errors.pop().__subclasses__()
    assert {bug.error for bug in BUGS} - {"WrongResult"} == found
