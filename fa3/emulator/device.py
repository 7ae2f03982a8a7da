"""The stand-in device: kernels that host code loads, memory they may touch, launches."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..launch.locks import Lock
from . import settings
from .checks import Checks
from .errors import EmulatorError, SetupError
from .images import Images
from .memory.regions import GlobalMemory
from .numerics import blas
from .shim import Launch, Shim
from .watching import watched

_LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
_SM_COUNT = 16
MAX_LAUNCHES_KEPT = 10_000

# cudaDeviceAttr -> value, an H200 as far as generated code cares
# fmt: off
ATTRIBUTES = {1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535, 8: 49152,
              10: 32, 12: 65536, 39: 2048, 75: 9, 76: 0, 81: 233472, 82: 65536, 95: 1,
              97: 232448, 106: 32, 111: 1024, 120: 1}
# fmt: on


def storages(value) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the memory behind the tensors inside a call argument."""
    if hasattr(value, "untyped_storage"):
        if value.device.type == "cpu":
            storage = value.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(value)
        yield low, high - low
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from storages(item)
    elif isinstance(value, dict):
        yield from storages(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from storages([getattr(value, f.name) for f in dataclasses.fields(value)])


class Device:
    """What the shim's callbacks talk to.  One launch runs at a time, whatever thread it is from."""

    def __init__(self, shim: Path):
        self.memory = GlobalMemory()
        self.images = Images()
        self.launches: list[dict] = []  # statistics, the latest MAX_LAUNCHES_KEPT launches
        self._libraries: dict[int, str | None] = {}  # handle -> PTX
        self._kernels: dict[int, tuple[str | None, str]] = {}  # handle -> PTX, entry name
        self._modules: dict[bytes, object] = {}  # digest of PTX -> parsed module
        self._edited: tuple[str, object] = ("", None)  # PTX after an edit, parsed
        self._allocations: dict[int, int] = {}  # address -> token
        self._lock = Lock(self._forget)
        self._failed = threading.local()
        self.shim = Shim(shim)
        self.shim.connect(
            load=self._load,
            kernel=self._kernel,
            launch=self._launch,
            attribute=self._attribute,
            alloc=self._alloc,
        )

    def _forget(self) -> None:
        """What a launch of another thread may have left half done at a fork."""
        self._modules, self._edited = {}, ("", None)
        blas.restore()

    def register(self, *tensors) -> None:
        """Let kernels touch the memory behind torch or numpy arrays for as long as those live."""
        for tensor in tensors:
            for address, nbytes in storages(tensor):
                self.register_range(tensor, address, nbytes)

    def register_range(self, owner, address: int, nbytes: int) -> None:
        """Let kernels touch a range of memory until `owner` is collected."""
        weakref.finalize(owner, self.memory.remove, self.memory.add(address, nbytes))

    @contextlib.contextmanager
    def visible(self, *arguments) -> Iterator[None]:
        """Let kernels touch the tensors among call arguments inside a with block.

        What a launch in the block raised comes out in place of the CUDA error that the
        host code made of it.
        """
        tokens = [self.memory.add(*storage) for storage in storages(arguments)]
        self._failed.error = None
        try:
            try:
                yield
            except Exception:
                self.reraise()
                raise
            self.reraise()
        finally:
            for token in tokens:
                self.memory.remove(token)

    def call(self, fn, *args):
        """fn(*args) with the memory of args visible to its kernels."""
        with self.visible(*args):
            return fn(*args)

    def reraise(self) -> None:
        """Raise what the last launch of this thread raised: its C frames only carried a code."""
        error = getattr(self._failed, "error", None)
        self._failed.error = None
        if isinstance(error, EmulatorError):  # says where in the kernel; where in here helps nobody
            raise error.with_traceback(None) from None
        if error is not None:
            raise error from None

    # callbacks of the shim; an exception must not leave them

    def _load(self, address: int, size: int) -> int:
        handle = len(self._libraries) + 1
        self._libraries[handle] = self.images.find(ctypes.string_at(address, size))
        return handle

    def _kernel(self, library: int, name: bytes) -> int:
        handle = len(self._kernels) + 1
        self._kernels[handle] = (self._libraries[library], name.decode())
        return handle

    def _attribute(self, number: int) -> int:
        return settings.current().sms if number == _SM_COUNT else ATTRIBUTES.get(number, 0)

    def _alloc(self, address: int, nbytes: int, add: int) -> None:
        if add:
            self._allocations[address] = self.memory.add(address, nbytes)
        else:
            self.memory.remove(self._allocations.pop(address, 0))

    def _launch(self, info) -> int:
        try:
            with self._lock:
                self._run(info.contents)
            return 0
        except BaseException as error:  # noqa: BLE001 - kept for reraise()
            self._failed.error = error
            self.shim.failed(f"{type(error).__name__}: {error}")
            return _LAUNCH_FAILURE

    # launches

    def _parsed(self, handle: int, edit):
        from .ptx import parse

        text, name = self._kernels[handle]
        if text is None:
            raise SetupError(
                f"no PTX is known for kernel {name}: it was compiled before the emulator was "
                "installed or in another process (see emulator.remember)"
            )
        if edit and (edited := edit(text)) != text:
            if self._edited[0] != edited:  # only the last: there may be hundreds
                self._edited = edited, parse(edited)
            return self._edited[1].kernels[name]
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in self._modules:
            self._modules[digest] = parse(text)
        return self._modules[digest].kernels[name]

    def forget_executed(self, ptx: str) -> None:
        """`executed` of this PTX text begins anew."""
        self._modules.pop(hashlib.sha256(ptx.encode()).digest(), None)

    def executed(self, ptx: str) -> set[int]:
        """Lines, from 1, of the instructions of a PTX text that were ever run (unedited)."""
        module, lines = self._modules.get(hashlib.sha256(ptx.encode()).digest()), set()
        for kernel in module.kernels.values() if module else ():
            for pc in set().union(*(x.executed() for x in kernel.lowered.values())):
                lines.add(kernel.code[pc].line)
        return lines

    def _run(self, info: Launch) -> None:
        from .execution.launch import Launch as Grid

        chosen = settings.current()
        kernel = self._parsed(info.kernel, chosen.edit)
        params = np.zeros(max(16, kernel.param_bytes), np.uint8)
        for i, p in enumerate(kernel.params):
            params[p.offset : p.offset + p.size] = np.frombuffer(
                ctypes.string_at(info.params[i], p.size), np.uint8
            )
        watched.clear()
        start = time.perf_counter()
        grid = Grid(
            kernel,
            tuple(info.grid),
            tuple(info.block),
            tuple(info.cluster),
            info.smem_bytes,
            params,
            self.memory,
            Checks(chosen.checks),
            chosen.instruction_limit,
            chosen.sms,
            chosen.timing(),
            chosen.accumulator,
            chosen.profile,
            chosen.processes,
            chosen.progress,
        )
        statistics = grid.run()
        self.launches.append(
            {
                "kernel": kernel.name,
                "grid": grid.grid,
                "block": grid.block,
                "cluster": grid.cluster,
                "smem": grid.smem_bytes,
                "seconds": time.perf_counter() - start,
                **statistics,
            }
        )
        del self.launches[:-MAX_LAUNCHES_KEPT]
