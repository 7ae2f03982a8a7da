"""Run the sm_90a code of CuTe DSL kernels on the CPU, without a GPU or a driver.

    from fa3 import emulator
    emulator.install()                  # before anything is compiled
    kernel = cute.compile(...)
    with emulator.options(checks=emulator.ALL_CHECKS):
        kernel(*cpu_tensors)

The PTX of a compiled function is executed over host memory; see docs/architecture.md.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from ..launch.locks import Lock
from .compare import ScheduleDifference, compare_schedules
from .errors import (
    BarrierMisuse,
    Deadlock,
    EmulatorError,
    KernelError,
    Misaligned,
    MissingProxyFence,
    MissingWgmmaFence,
    OutOfBounds,
    Race,
    RegisterInFlight,
    Runaway,
    SetupError,
    Uninitialized,
    Unsupported,
)
from .profiling import Profile
from .settings import (
    ACCUMULATORS,
    ALL_CHECKS,
    CHECKS,
    SCHEDULES,
    Options,
    configure,
    options,
    profile,
)
from .watching import watch, watched

# fmt: off
__all__ = [
    "ACCUMULATORS", "ALL_CHECKS", "ARCHITECTURES", "CHECKS", "SCHEDULES", "BarrierMisuse",
    "Deadlock", "EmulatorError", "KernelError", "Misaligned", "MissingProxyFence",
    "MissingWgmmaFence", "Options", "OutOfBounds", "Profile", "Race", "RegisterInFlight", "Runaway",
    "ScheduleDifference", "SetupError", "Uninitialized", "Unsupported", "call", "compare_schedules",
    "configure", "install", "installed", "launches", "options", "profile", "register", "remember",
    "watch", "watched",
]
# fmt: on

launches: list[dict] = []
"""One dict per launch: kernel, grid, block, cluster, smem, seconds, instructions, segments, and
processes, with the reason (serial) where it is one."""

_device = None
_arch = None
_lock = Lock()

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a")
"""What install() takes."""


def install(arch: str = "sm_90a") -> None:
    """Make this process compile for arch and run its kernels on the CPU; does nothing twice.

    Raises SetupError where that cannot work: another DSL version than the known ones, no C
    compiler, an arch that is none of ARCHITECTURES or another than the first time.
    """
    global _device, _arch
    if arch not in ARCHITECTURES:
        raise SetupError(f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    with _lock:
        if _device is not None:
            if arch != _arch:
                raise SetupError(f"the emulator was installed for {_arch}, not {arch}")
            return
        from . import dsl, shim
        from .device import Device

        dsl.check_version()
        folder = _folder()
        library = shim.build(folder)
        dsl.check_runtime(library)
        dsl.set_environment(arch, library, folder)
        device = Device(library)
        device.launches = launches
        dsl.patch(device)
        _device, _arch = device, arch


def _folder() -> Path:
    """A folder of this process, removed at its end, not at that of a forked child."""
    folder, process = tempfile.mkdtemp(prefix="fa3_emulator_"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def installed() -> bool:
    return _device is not None


def _installed_device():
    if _device is None:
        raise SetupError("call emulator.install() first")
    return _device


def remember(cubin: bytes, ptx: str) -> None:
    """Pair a cubin from outside this process (a disk cache) with the PTX it was assembled from."""
    _installed_device().images.remember(cubin, ptx)


def register(*tensors) -> None:
    """Let kernels touch the memory of torch or numpy arrays for as long as those live.

    Needed only for memory that a kernel reaches by other ways than its arguments.
    """
    _installed_device().register(*tensors)


def call(fn, *args):
    """fn(*args), where kernels may touch the tensors in args; raises the emulator's own errors.

    Functions made by cute.compile do this themselves; ones loaded from an object file do not.
    """
    return _installed_device().call(fn, *args)
