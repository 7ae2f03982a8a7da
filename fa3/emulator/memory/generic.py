"""ld and st on global and generic addresses.

A generic address has its space in bits 56 and up: 0 global (a host address), 1 shared,
2 parameters, 3 local.
"""

from __future__ import annotations

import numpy as np

from ..errors import Misaligned, OutOfBounds
from . import local, places, shared

GLOBAL, SHARED, PARAMETERS, LOCAL = range(4)
WINDOW_SHIFT = 56
_OFFSET = np.uint64(0xFFFFFFFF)

# (whether it acquires, whether it releases), for the whole GPU; None: a plain access
Strong = tuple[bool, bool] | None


def window(w, m, address) -> int:
    """The space of the addresses of the active lanes (all have the same)."""
    if address.dtype.itemsize != 8:
        return GLOBAL
    a = w.active(address, m)
    return int(a[0]) >> WINDOW_SHIFT if a.size else GLOBAL


def shared_offset(address):
    return (address & _OFFSET).astype(np.uint32)


def locate(w, m, dtype, address, offset, nbytes, what):
    """(array, element indices of the active lanes), or (None, addresses) if regions differ."""
    a = w.active(address, m).astype(np.int64) + offset
    lo, hi = int(a.min()), int(a.max())
    if (a & (nbytes - 1)).any():
        bad = int(a[(a & (nbytes - 1)) != 0][0])
        raise Misaligned(f"{nbytes}-byte global {what} at {bad:#x}")
    try:
        region = w.memory.find(lo, hi + nbytes, what)
    except OutOfBounds:
        if lo == hi:
            raise
        return None, a
    return region.view(dtype), (a - region.start) // np.dtype(dtype).itemsize


def _element(w, dtype, address: int, what: str):
    """(array, index) of one element."""
    es = np.dtype(dtype).itemsize
    region = w.memory.find(address, address + es, what)
    return region.view(dtype), (address - region.start) // es


def load(w, m, dtype, rows, address, offset, strong: Strong = None):
    """strong: with .acquire, .relaxed or .volatile."""
    if m is not None and not m.any():
        return
    space = window(w, m, address)
    if space == SHARED:
        return shared.load(w, m, dtype, rows, shared_offset(address), offset)
    if space == LOCAL:
        return local.load(w, m, dtype, rows, address & _OFFSET, offset)
    es = np.dtype(dtype).itemsize
    if space == PARAMETERS:
        array = w.params[: len(w.params) // es * es].view(dtype)
        index = (w.active(address & _OFFSET, m).astype(np.int64) + offset) // es
    else:
        array, index = locate(w, m, dtype, address, offset, es * len(rows), "read")
        if w.launch.read_observer is not None:
            _observe(w, m, address, offset, es * len(rows), strong)
    lanes = slice(None) if m is None else m
    for i, row in enumerate(rows):
        if row is None:
            continue
        if array is not None:
            row[lanes] = array[index + i]
        else:
            found = [_element(w, dtype, a + i * es, "read") for a in index.tolist()]
            row[lanes] = np.array([x[j] for x, j in found], dtype)


def _observe(w, m, address, offset, nbytes: int, strong: Strong, written=None) -> None:
    """Tell of an access of the active lanes to global memory; written: rows of a store."""
    writes = written is not None
    observer = w.launch.write_observer if writes else w.launch.read_observer
    a = w.active(address, m).astype(np.int64) + offset
    if strong is not None:
        return synchronise(w, m, a, *strong)
    threads = w.threads[w.lane_list(m)]
    a, values = np.broadcast_to(a, threads.shape), None
    if writes and w.cluster.global_races is not None:
        columns = [np.broadcast_to(w.active(row, m), a.shape) for row in written]
        values = np.stack(columns, 1).view(np.uint8)
    while len(a):  # usually all lie in one region
        region = w.memory.find(int(a[0]), int(a[0]) + nbytes)
        here = (a >= region.start) & (a < region.end)
        offsets = a[here] - region.start
        if observer.order is None:
            observer.access(w, region, places.indices(offsets, nbytes), writes)
        else:
            for _, mine, operation in w.races.by_warp(threads[here]):
                where = places.indices(offsets[mine], nbytes)
                observer.access(w, region, where, writes, operation=operation)
        if w.cluster.global_races is not None:
            own = None if values is None else values[here]
            w.cluster.global_races.plain(region, offsets, nbytes, threads[here], own)
        a, threads = a[~here], threads[~here]
        values = None if values is None else values[~here]


def synchronise(w, m, addresses, acquires: bool, releases: bool) -> None:
    """Tell of atomics of the active lanes on global memory, or of what counts as such."""
    if w.launch.write_observer is None and w.cluster.global_races is None:
        return
    lanes = np.array(w.lane_list(m))
    if w.launch.write_observer is not None:
        addresses = np.broadcast_to(addresses, lanes.shape)
        w.launch.write_observer.synchronise(w, lanes, addresses, acquires, releases)
    if w.cluster.global_races is not None:
        w.cluster.global_races.synchronise(w, lanes)


def fence(w, m) -> None:
    """fence.acq_rel, fence.sc or membar, for the whole GPU.  Memory is sequentially consistent."""
    if w.launch.write_observer is not None:
        w.launch.write_observer.fence(w, np.array(w.lane_list(m)))


def store(w, m, dtype, rows, address, offset, strong: Strong = None):
    """strong: with .release, .relaxed or .volatile."""
    if m is not None and not m.any():
        return
    space = window(w, m, address)
    if space == SHARED:
        return shared.store(w, m, dtype, rows, shared_offset(address), offset)
    if space == LOCAL:
        return local.store(w, m, dtype, rows, address & _OFFSET, offset)
    es = np.dtype(dtype).itemsize
    array, index = locate(w, m, dtype, address, offset, es * len(rows), "write")
    if w.launch.write_observer is not None:
        _observe(w, m, address, offset, es * len(rows), strong, rows)
    w.cluster.events += 1
    for i, row in enumerate(rows):
        values = w.active(row, m)
        if array is not None:
            array[index + i] = values
        else:
            for a, value in zip(index.tolist(), np.broadcast_to(values, index.shape), strict=True):
                x, j = _element(w, dtype, a + i * es, "write")
                x[j] = value
