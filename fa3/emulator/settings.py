"""How launches run: which checks are on, and how big the device is."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from .errors import SetupError

if TYPE_CHECKING:
    from .profiling import Profile

CHECKS = {
    "proxy": "generic writes that the async proxy reads without the writer's fence.proxy.async",
    "uninit": "reads of shared memory that nothing wrote (some kernels mask the values later), and "
    "uses of registers that a thread did not write",
    "poison": "shared memory and registers start as NaN patterns, so that using them shows",
    "wgmma": "registers of a wgmma in flight used or overwritten before wait_group",
    "fence": "registers of a wgmma that others used, with no wgmma.fence since",
    "late": "asynchronous work completes as late as it may: bulk loads when nothing else can run, "
    "wgmma, bulk stores and cp.async at the wait that covers them",
    "mbarrier": "ordinary stores over a live mbarrier",
    "box": "stages that TMA fills from outside of a tensor alone, with zeros",
    "race": "accesses to shared memory, asynchronous ones included, that no barrier or wait orders",
    "global": "plain accesses of different clusters to global memory that no atomics order",
    "sums": "floating-point additions to global memory in an order that nothing fixes, so that the "
    "result is another one every time; for kernels that promise the same bits, needs race, global",
}
ALL_CHECKS = tuple(name for name in CHECKS if name != "sums")  # which most kernels may do
SCHEDULES = ("eager", "late", "random")
ACCUMULATORS = {
    "fp32": "products are exact and are added in fp32",
    "short": "wgmma on FP8 operands adds as Hopper does, with 13 fraction bits "
    "(numerics/short_sum.py); all else as fp32",
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When asynchronous work completes, and in which order warps run.

    eager    at issue; each warpgroup runs until it is blocked
    late     bulk loads when nothing else can run, all else at the wait that covers it
    random   at random moments between those; warps are interleaved at random
    """

    kind: str = "eager"
    seed: int = 0  # of random
    trace: list | None = None  # if given, every asynchronous operation is appended to it

    def __post_init__(self):
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.kind!r}; known are {', '.join(SCHEDULES)}")

    @property
    def elects_highest(self) -> bool:
        """Whether elect.sync elects the highest lane of a warp, not the lowest."""
        return self.kind == "random" and self.seed % 2 == 1

    @property
    def defers(self) -> bool:
        return self.kind != "eager"


def names(checks: str | Iterable[str]) -> tuple[str, ...]:
    """Several names of checks, or one."""
    if isinstance(checks, str):
        return (checks,)
    if not isinstance(checks, Iterable):
        raise TypeError(f"checks is {checks!r}, expected names among {', '.join(CHECKS)}")
    return tuple(checks)


@dataclasses.dataclass(frozen=True)
class Options:
    checks: tuple[str, ...] = ()
    """Names among CHECKS; one alone may be given as a string."""
    sms: int = 132
    """Streaming multiprocessors that HardwareInfo and %nsmid report."""
    instruction_limit: int = 20_000_000
    """Warpgroup instructions of one cluster after which it counts as an endless loop."""
    schedule: str | None = None
    """See Schedule.  None: "late" if the check of that name is on, else "eager"."""
    seed: int = 0
    """Of the schedule "random": the same seed gives the same run."""
    trace: list | None = None
    """Where to note every asynchronous operation (memory/operations.py); None: nowhere."""
    accumulator: str = "fp32"
    """How wgmma adds, see ACCUMULATORS."""
    profile: Profile | None = None
    """Gets counters and a timeline of each launch; needs the eager schedule."""
    processes: int | None = None
    """Over how many processes a launch may spread its clusters (execution/processes.py).  None: as
    many as there are cores, where that pays."""
    progress: Callable[[int, int], None] | None = None
    """Called after each cluster of a launch: how many are done, of how many."""
    edit: Callable[[str], str] | None = None
    """Applied to the PTX before it is parsed: how the tests break a kernel on purpose."""

    def __post_init__(self):
        object.__setattr__(self, "checks", names(self.checks))
        if unknown := set(self.checks) - set(CHECKS):
            raise ValueError(f"unknown checks {sorted(unknown)}; known are {', '.join(CHECKS)}")
        if "sums" in self.checks and not {"race", "global"} <= set(self.checks):
            raise ValueError('the check "sums" needs the checks "race" and "global"')
        if self.accumulator not in ACCUMULATORS:
            raise ValueError(
                f"unknown accumulator {self.accumulator!r}; known are {', '.join(ACCUMULATORS)}"
            )
        if self.sms < 1:
            raise ValueError(f"sms must be at least 1, not {self.sms}")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, not {self.processes}")
        if self.timing().kind != "eager" and self.profile is not None:
            raise ValueError(
                f'a profile needs schedule="eager", not {self.timing().kind!r} (which the check '
                '"late" chooses where no schedule is given)'
            )

    def timing(self) -> Schedule:
        """The schedule that these options choose."""
        kind = self.schedule or ("late" if "late" in self.checks else "eager")
        return Schedule(kind, self.seed, self.trace)


_default = Options()
_scoped: contextvars.ContextVar[Options | None] = contextvars.ContextVar(
    "emulator_options", default=None
)


def current() -> Options:
    """The options of the innermost options() block of this context, or the configured defaults."""
    return _scoped.get() or _default


def _changed(base: Options, late: bool | None, changes: dict) -> Options:
    base = dataclasses.replace(base, **changes)
    if late is None or late == ("late" in base.checks):
        return base
    others = tuple(c for c in base.checks if c != "late")
    return dataclasses.replace(base, checks=(*others, "late") if late else others)


def configure(*, late: bool | None = None, **changes) -> None:
    """Change the defaults of later launches: fields of Options.

    late switches the check of that name on or off and leaves the others alone.
    """
    global _default
    _default = _changed(_default, late, changes)


@contextlib.contextmanager
def options(*, late: bool | None = None, **changes) -> Iterator[Options]:
    """Run launches with other options inside a with block; arguments as in configure().

    They hold for the thread (more exactly, the context) that enters the block.  Raises SetupError
    where a kernel in the block asked for a GPU, as the emulator is not installed.
    """
    token = _scoped.set(_changed(current(), late, changes))
    try:
        yield current()
    except Exception as error:
        if _wants_gpu(error) and not _installed():
            raise SetupError(
                "the kernel was compiled for a GPU, as the emulator is not installed: call "
                "emulator.install() before anything is compiled"
            ) from error
        raise
    finally:
        _scoped.reset(token)


def _wants_gpu(error: Exception) -> bool:
    """Whether the DSL found no driver, or a TVM-FFI function was given CPU tensors."""
    return type(error).__name__ == "DSLCudaRuntimeError" or "device_type=cuda" in str(error)


def _installed() -> bool:
    from . import installed

    return installed()


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Profile the launches inside a with block; they run under the eager schedule."""
    from .profiling import Profile

    found = Profile()
    with options(schedule="eager", profile=found):
        yield found
