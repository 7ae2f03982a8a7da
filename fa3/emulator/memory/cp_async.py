"""cp.async (Ampere): 4 to 16 bytes per lane from global to shared memory.

A generic-proxy write by the PTX ISA.  Completes at once or, as the schedule says, up to the wait
that covers it.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..numerics.formats import rows
from . import mbarrier, shared
from .groups import Groups
from .operations import Operation
from .places import Indices, indices, observe


def copy(w, m, site, size, dst, dst_offset, src, src_offset, src_size):
    """src_size: bytes to read, the rest of the `size` bytes is zero (None: all)."""
    if m is not None and not m.any():
        return
    if not w.groups_kept:
        return _copy(w, m, site, size, dst, dst_offset, src, src_offset, src_size)
    dst, src, src_size = (
        None if x is None else rows(x, w.lanes).copy() for x in (dst, src, src_size)
    )
    mask = (w.live if m is None else m).reshape(-1, 32)
    for warp in np.flatnonzero(mask.any(1)).tolist():
        own = np.zeros_like(mask)
        own[warp] = mask[warp]
        lanes = own.reshape(-1)
        work = partial(_copy, w, lanes, site, size, dst, dst_offset, src, src_offset, src_size)
        a = w.active(dst, lanes).astype(np.int64) + dst_offset
        span = (w.cta.smem, int(a.min()), int(a.max()) + size, True)
        access = None
        if w.races is not None:
            access = w.races.begin(w, lanes, "cp.async", "cp.async", site)
            words = (a[:, None] + np.arange(0, size, 4) >> 2).ravel()
            w.races.write(w.cta.smem.shadow, words, access)
        work, clock = partial(work, access=access), None if access is None else access.clock
        operation = Operation(w, site, lanes, "cp.async", [span], work, clock)
        if w.races is not None:
            operation.wrote = a, size, w.threads[lanes]
        w.cp_async.add(warp, operation)
        w.cluster.issue(operation, waited_for=True)


def _copy(w, m, site, size, dst, dst_offset, src, src_offset, src_size, access=None):
    memory, a = shared.locate(w, m, dst, dst_offset, size)
    g = w.active(src, m).astype(np.int64) + src_offset
    n = (
        np.full(len(a), size)
        if src_size is None
        else np.broadcast_to(w.active(src_size, m).astype(np.int64), a.shape)
    )
    memory.generic_write(w, m, a, size, raced=False)
    out = np.zeros((len(a), size), np.uint8)
    some = n > 0
    if some.any():
        out[some] = _read(w, g[some], n[some], size)
        if w.launch.read_observer is not None:
            region = w.memory.find(int(g[some].min()), int((g[some] + n[some]).max()))
            at = [
                indices([s - region.start], k).at
                for s, k in zip(g[some].tolist(), n[some].tolist(), strict=True)
            ]
            observe(w, region, Indices(np.concatenate(at)), False, site, access)
    memory.raw[: len(memory.raw) // size * size].reshape(-1, size)[a // size] = out


def _read(w, addresses, counts, size: int):
    """(lanes, size) bytes: counts[i] from addresses[i], then zeros."""
    region = w.memory.find(int(addresses.min()), int((addresses + counts).max()), "cp.async read")
    at = addresses - region.start
    if (counts == size).all() and not (at % size).any():
        whole = len(region.bytes) // size * size
        return region.bytes[:whole].reshape(-1, size)[at // size]
    out = np.zeros((len(at), size), np.uint8)
    for i, (start, count) in enumerate(zip(at.tolist(), counts.tolist(), strict=True)):
        out[i, :count] = region.bytes[start : start + count]
    return out


def _warps(w, m) -> list[int]:
    return np.flatnonzero((w.live if m is None else m).reshape(-1, 32).any(1)).tolist()


def commit(w, m):
    groups: Groups = w.cp_async
    for warp in _warps(w, m) if w.groups_kept else ():
        groups.commit(warp)


def wait(w, m, keep):
    """cp.async.wait_group keep, or wait_all for None."""
    for warp in _warps(w, m) if w.groups_kept else ():
        if keep is None:
            w.cp_async.commit(warp)
        _drain(w, warp, keep or 0)


def mbarrier_arrive(w, m, address, offset, noinc):
    """cp.async.mbarrier.arrive: once the thread's copies are complete.

    Without .noinc the pending count goes up by one first: no net change.
    """
    for warp in _warps(w, m) if w.groups_kept else ():
        w.cp_async.commit(warp)
        _drain(w, warp, 0)
    if noinc:
        mbarrier.arrive(w, m, None, address, offset, None, False)
    else:
        mbarrier.pass_on(w, m, address, offset)


def _drain(w, warp: int, keep: int) -> None:
    lanes = np.arange(w.lanes) // 32 == warp
    for operation in w.cp_async.drain(warp, keep):
        if w.races is not None:
            agents = w.races.agents(w, lanes)
            w.races.acquire(agents, operation.clock)
            w.races.generic(w.cta.smem, *operation.wrote, writes=True)  # of each lane, from now on
