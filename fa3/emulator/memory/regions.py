"""The ranges of host memory that kernels may touch."""

from __future__ import annotations

import bisect
import ctypes
import itertools

import numpy as np

from ...launch.locks import Lock
from ..errors import OutOfBounds

_BYTE = np.dtype(np.uint8)


class Region:
    """Host bytes [start, end) with typed views of them."""

    __slots__ = ("start", "end", "bytes", "_views")

    def __init__(self, start: int, end: int):
        self.start, self.end = start, end
        self.bytes = np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), _BYTE)
        self._views = {_BYTE: self.bytes}

    def view(self, dtype) -> np.ndarray:
        """All whole elements of dtype, from the start of the region."""
        view = self._views.get(dtype)
        if view is None:
            dtype = np.dtype(dtype)
            whole = len(self.bytes) // dtype.itemsize * dtype.itemsize
            view = self._views[dtype] = self.bytes[:whole].view(dtype)
        return view


class GlobalMemory:
    """Registered ranges; overlapping ones (views of one storage) act as one region.

    Nothing is kept alive: whoever adds a range removes it before the memory goes away.
    """

    def __init__(self):
        self._ranges: dict[int, tuple[int, int]] = {}
        self._tokens = itertools.count(1)
        self._regions: list[Region] | None = []
        self._starts: list[int] = []
        self._lock = Lock(self._changed)

    def __len__(self):
        return len(self._ranges)

    def _changed(self) -> None:
        self._regions = None

    def add(self, start: int, nbytes: int) -> int:
        """Let kernels touch nbytes from address start; returns the token for remove()."""
        token = next(self._tokens)
        if nbytes > 0:
            with self._lock:
                self._ranges[token] = (start, start + nbytes)
                self._changed()
        return token

    def remove(self, token: int) -> None:
        with self._lock:
            if self._ranges.pop(token, None):
                self._changed()

    def _merge(self) -> list[Region]:
        with self._lock:
            merged: list[list[int]] = []
            for lo, hi in sorted(set(self._ranges.values())):
                if merged and lo < merged[-1][1]:
                    merged[-1][1] = max(merged[-1][1], hi)
                else:
                    merged.append([lo, hi])
            self._starts = [lo for lo, _ in merged]
            self._regions = regions = [Region(lo, hi) for lo, hi in merged]
            return regions

    def find(self, lo: int, hi: int, what: str = "access") -> Region:
        """The region holding [lo, hi); OutOfBounds if there is none."""
        regions = self._regions if self._regions is not None else self._merge()
        i = bisect.bisect(self._starts, lo) - 1
        if i >= 0:
            region = regions[i]
            if hi <= region.end:
                return region
        raise OutOfBounds(
            f"global {what} at {lo:#x}..{hi:#x} is outside every registered tensor"
            f"{self._nearest(lo)}"
        )

    def _nearest(self, address: int) -> str:
        if not self._regions:
            return " (none is registered)"
        near = min(self._regions, key=lambda r: min(abs(address - r.start), abs(address - r.end)))
        if address < near.start:
            where = f"{near.start - address} bytes before the start of"
        else:
            where = f"{address - near.start} bytes after the start of"
        return f" ({where} the nearest, {near.start:#x}..{near.end:#x})"
