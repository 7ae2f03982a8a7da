"""Local memory: bytes of each thread alone, where it also puts the parameters of calls."""

from __future__ import annotations

import numpy as np

from ..errors import Misaligned, OutOfBounds


def _elements(w, m, dtype, address, offset, count: int, what: str):
    """(local memory as elements of dtype, the active lanes, the first element of each)"""
    size = np.dtype(dtype).itemsize
    a = w.active(address, m).astype(np.int64) + offset
    if (a % (size * count)).any():
        raise Misaligned(
            f"{size * count}-byte local {what} at {int(a[a % (size * count) != 0][0]):#x}"
        )
    if int(a.min()) < 0 or int(a.max()) + size * count > w.launch.kernel.local_bytes:
        raise OutOfBounds(
            f"local {what} at {int(a.min()):#x}..{int(a.max()) + size * count:#x} outside the "
            f"thread's {w.launch.kernel.local_bytes:#x} bytes"
        )
    lanes = np.flatnonzero(w.all if m is None else m)
    return w.local.view(dtype), lanes, a // size


def load(w, m, dtype, rows, address, offset):
    memory, lanes, first = _elements(w, m, dtype, address, offset, len(rows), "read")
    for i, row in enumerate(rows):
        if row is not None:
            row[lanes] = memory[lanes, first + i]


def store(w, m, dtype, rows, address, offset):
    memory, lanes, first = _elements(w, m, dtype, address, offset, len(rows), "write")
    for i, row in enumerate(rows):
        memory[lanes, first + i] = w.active(row, m)
