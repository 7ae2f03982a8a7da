"""Functions that take the place of emulated ones in generated code while a launch is profiled.

Each tells the cluster's observer and calls the original, so that code without a profile contains
nothing of this (lowering.emitter.Emitter.bind).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..execution import fragments, register_file, sync
from ..execution.fragments import WAITING
from ..matrix import ldmatrix, mma, wgmma
from ..matrix.elements import ELEMENT
from ..memory import atomics, bulk, cp_async, generic, mbarrier, shared, tensormap
from ..memory.shared import OFFSET
from ..numerics.formats import rows as full_rows
from . import observer

INSTRUMENTS: dict[Callable, Callable] = {}


def instruments(original: Callable):
    """Register f as what generated code calls instead of the original."""

    def register(f):
        INSTRUMENTS[original] = f
        return f

    return register


def _addresses(w, address, offset) -> np.ndarray:
    return full_rows(address, w.lanes).astype(np.int64) + offset


# plain accesses


@instruments(shared.load)
def _shared_load(w, m, dtype, rows, address, offset):
    nbytes = np.dtype(dtype).itemsize * len(rows)
    w.profile.shared_access(w, m, "ld", _addresses(w, address, offset) & OFFSET, nbytes)
    shared.load(w, m, dtype, rows, address, offset)


@instruments(shared.store)
def _shared_store(w, m, dtype, rows, address, offset):
    nbytes = np.dtype(dtype).itemsize * len(rows)
    w.profile.shared_access(w, m, "st", _addresses(w, address, offset) & OFFSET, nbytes)
    shared.store(w, m, dtype, rows, address, offset)


def _generic(w, m, kinds, nbytes: int, address, offset) -> None:
    """kinds: of an access to shared and to global memory."""
    if m is not None and not m.any():
        return
    space = generic.window(w, m, address)
    if space == generic.SHARED:
        at = _addresses(w, generic.shared_offset(address), offset) & OFFSET
        w.profile.shared_access(w, m, kinds[0], at, nbytes)
    elif space == generic.GLOBAL:
        w.profile.count_bytes(w, m, kinds[1], nbytes)


@instruments(generic.load)
def _load(w, m, dtype, rows, address, offset, strong=None):
    _generic(w, m, ("ld", "loaded"), np.dtype(dtype).itemsize * len(rows), address, offset)
    generic.load(w, m, dtype, rows, address, offset, strong)


@instruments(generic.store)
def _store(w, m, dtype, rows, address, offset, strong=None):
    _generic(w, m, ("st", "stored"), np.dtype(dtype).itemsize * len(rows), address, offset)
    generic.store(w, m, dtype, rows, address, offset, strong)


@instruments(atomics.atomic)
def _atomic(w, m, how, row, address, offset, b, c):
    space, dtype = how[0], how[3]
    if space == "global" and (m is None or m.any()):
        if generic.window(w, m, address) == generic.GLOBAL:
            w.profile.count_bytes(w, m, "summed", np.dtype(dtype).itemsize)
    atomics.atomic(w, m, how, row, address, offset, b, c)


@instruments(ldmatrix.load)
def _ldmatrix(w, m, registers, address, offset, transposed):
    warps, at = ldmatrix.row_addresses(w, m, address, offset, len(registers))
    w.profile.matrix_access(w, "ldmatrix", warps.tolist(), at)
    ldmatrix.load(w, m, registers, address, offset, transposed)


@instruments(ldmatrix.store)
def _stmatrix(w, m, registers, address, offset, transposed):
    warps, at = ldmatrix.row_addresses(w, m, address, offset, len(registers))
    w.profile.matrix_access(w, "stmatrix", warps.tolist(), at)
    ldmatrix.store(w, m, registers, address, offset, transposed)


# matrix products


@instruments(mma.mma)
def _mma(w, m, how, d, a, b, c):
    w.profile.mma(w, m, how[0])
    mma.mma(w, m, how, d, a, b, c)


@instruments(wgmma.issue)
def _wgmma(w, shape, a, b, accumulate):
    w.profile.wgmma(w, shape, ELEMENT[shape.types[1]][0])
    wgmma.issue(w, shape, a, b, accumulate)


def _cycles(shape) -> float:
    return observer.wgmma_cycles(shape, ELEMENT[shape.types[1]][0])


@instruments(wgmma.commit)
def _wgmma_commit(w):
    w.profile.commit_wgmmas(w, _cycles)
    wgmma.commit(w)


@instruments(wgmma.wait)
def _wgmma_wait(w, keep):
    w.profile.wait_for_groups(w, None, "wgmma", [()], keep)
    wgmma.wait(w, keep)


# bulk copies


def _load_bulk(w, lane: int, sizes, targets, name: str) -> None:
    """sizes: (whole, clipped) bytes; targets as in bulk.destinations."""
    whole, clipped = sizes
    barriers = [mbarrier.find(w, barrier) for _, _, barrier in targets]
    w.profile.moved(4 * w.index + lane // 32, bulk_loaded=whole * len(targets), bulk_read=clipped)
    w.profile.load(w, lane // 32, whole, barriers, name)


@instruments(bulk.tensor_load)
def _tensor_load(w, m, site, dst, dst_offset, source, barrier, barrier_offset, multicast):
    address, coords = source
    for lane in w.lane_list(m):
        where = w.lane_value(address, lane)
        box = tensormap.find(w, where)
        at = [w.lane_value(x, lane) for x in coords]
        d = w.lane_value(dst, lane) + dst_offset
        b = w.lane_value(barrier, lane) + barrier_offset
        mask = None if multicast is None else w.lane_value(multicast, lane)
        sizes = box.box_bytes, observer.clipped(box, at)
        shape = "x".join(str(n) for n in box.box if n > 1)
        name = f"box {shape} of {_origin(w, where)}"
        _load_bulk(w, lane, sizes, bulk.destinations(w, d, b, mask), name)
    bulk.tensor_load(w, m, site, dst, dst_offset, source, barrier, barrier_offset, multicast)


def _origin(w, address: int) -> str:
    """The parameter of the kernel in which a tensor map lies."""
    if address >> generic.WINDOW_SHIFT != generic.PARAMETERS:
        return "a map in memory"
    at = address & 0xFFFFFFFF
    kernel = w.launch.kernel
    number = max(i for i, p in enumerate(kernel.params) if p.offset <= at)
    return f"parameter {number}"


@instruments(bulk.load)
def _bulk_load(w, m, site, dst, dst_offset, source, barrier, barrier_offset, multicast):
    for lane in w.lane_list(m):
        d, n = w.lane_value(dst, lane) + dst_offset, w.lane_value(source[2], lane)
        b = w.lane_value(barrier, lane) + barrier_offset
        mask = None if multicast is None else w.lane_value(multicast, lane)
        _load_bulk(w, lane, (n, n), bulk.destinations(w, d, b, mask), f"{n} bytes")
    bulk.load(w, m, site, dst, dst_offset, source, barrier, barrier_offset, multicast)


@instruments(bulk.between_ctas)
def _between_ctas(w, m, dst, dst_offset, src, src_offset, size, barrier, barrier_offset):
    for lane in w.lane_list(m):
        d, n = w.lane_value(dst, lane) + dst_offset, w.lane_value(size, lane)
        b = w.lane_value(barrier, lane) + barrier_offset
        _load_bulk(w, lane, (n, 0), bulk.destinations(w, d, b, None), f"{n} bytes of a CTA")
    bulk.between_ctas(w, m, dst, dst_offset, src, src_offset, size, barrier, barrier_offset)


def _store_bulk(w, lane: int, whole: int, clipped: int, reduction) -> None:
    arrived = {"bulk_written" if reduction is None else "summed": clipped}
    w.profile.moved(4 * w.index + lane // 32, bulk_stored=whole, **arrived)
    w.profile.store(w, lane, whole)


@instruments(bulk.tensor_store)
def _tensor_store(w, m, site, target, src, src_offset, reduction):
    address, coords = target
    seen = set()
    for lane in w.lane_list(m):
        box = tensormap.find(w, w.lane_value(address, lane))
        at = tuple(w.lane_value(x, lane) for x in coords)
        same = (box.address, at, w.lane_value(src, lane), lane // 32)
        if reduction is not None or same not in seen:  # as bulk.tensor_store
            _store_bulk(w, lane, box.box_bytes, observer.clipped(box, at), reduction)
        seen.add(same)
    bulk.tensor_store(w, m, site, target, src, src_offset, reduction)


@instruments(bulk.store)
def _bulk_store(w, m, site, dst, dst_offset, src, src_offset, size, reduction):
    for lane in w.lane_list(m):
        n = w.lane_value(size, lane)
        _store_bulk(w, lane, n, n, reduction)
    bulk.store(w, m, site, dst, dst_offset, src, src_offset, size, reduction)


@instruments(bulk.commit)
def _bulk_commit(w, m):
    for lane in w.lane_list(m):
        w.profile.groups.commit((w, "bulk group", lane))
    bulk.commit(w, m)


@instruments(bulk.wait)
def _bulk_wait(w, m, keep):
    owners = [(lane,) for lane in w.lane_list(m)]
    if owners:
        w.profile.wait_for_groups(w, m, "bulk group", owners, keep)
    bulk.wait(w, m, keep)


@instruments(bulk.store_async)
def _store_async(w, m, dtype, rows, address, offset, barrier, barrier_offset):
    nbytes = np.dtype(dtype).itemsize * len(rows)
    w.profile.shared_access(w, m, "st", _addresses(w, address, offset) & OFFSET, nbytes)
    w.profile.arrive(w, m, _barriers(w, m, barrier, barrier_offset))
    bulk.store_async(w, m, dtype, rows, address, offset, barrier, barrier_offset)


# cp.async


def _warps(w, m) -> list[int]:
    return np.flatnonzero((w.live if m is None else m).reshape(-1, 32).any(1)).tolist()


@instruments(cp_async.copy)
def _cp_async(w, m, site, size, dst, dst_offset, src, src_offset, src_size):
    for warp in _warps(w, m):
        lanes = (np.arange(w.lanes) // 32 == warp) & (w.live if m is None else m)
        counts = size if src_size is None else full_rows(src_size, w.lanes)[lanes]
        nbytes = int(np.broadcast_to(counts, int(lanes.sum())).sum())
        w.profile.moved(4 * w.index + warp, cp_async=nbytes)
        w.profile.copy_by_lanes(w, warp, nbytes)
    cp_async.copy(w, m, site, size, dst, dst_offset, src, src_offset, src_size)


@instruments(cp_async.commit)
def _cp_async_commit(w, m):
    for warp in _warps(w, m):
        w.profile.groups.commit((w, "cp.async group", warp))
    cp_async.commit(w, m)


def _drain_cp_async(w, m, keep) -> None:
    owners = [(warp,) for warp in _warps(w, m)]
    if keep is None:
        for (warp,) in owners:
            w.profile.groups.commit((w, "cp.async group", warp))
    if owners:
        w.profile.wait_for_groups(w, m, "cp.async group", owners, keep or 0)


@instruments(cp_async.wait)
def _cp_async_wait(w, m, keep):
    _drain_cp_async(w, m, keep)
    cp_async.wait(w, m, keep)


@instruments(cp_async.mbarrier_arrive)
def _cp_async_arrive(w, m, address, offset, noinc):
    _drain_cp_async(w, m, None)
    w.profile.arrive(w, m, _barriers(w, m, address, offset))
    cp_async.mbarrier_arrive(w, m, address, offset, noinc)


# barriers


def _barriers(w, m, address, offset) -> list:
    active = np.unique(_addresses(w, address, offset)[w.live if m is None else m])
    return [mbarrier.find(w, at) for at in active.tolist()]


@instruments(mbarrier.arrive)
def _arrive(w, m, row, address, offset, x, expect):
    w.profile.arrive(w, m, _barriers(w, m, address, offset))
    mbarrier.arrive(w, m, row, address, offset, x, expect)


@instruments(mbarrier.transaction)
def _transaction(w, m, address, offset, nbytes, sign):
    if sign > 0:
        w.profile.arrive(w, m, _barriers(w, m, address, offset))
    mbarrier.transaction(w, m, address, offset, nbytes, sign)


@instruments(mbarrier.wait)
def _mbarrier_wait(w, fr, row, address, offset, x, how, pc, after):
    going = mbarrier.wait(w, fr, row, address, offset, x, how, pc, after)
    if _blocked(fr, going, pc):
        w.profile.again(w, fr)
        return going
    pairs = np.stack([_addresses(w, address, offset), full_rows(x, w.lanes).astype(np.int64)])
    for at, value in np.unique(pairs[:, fr.mask], axis=1).T.tolist():
        barrier, parity = mbarrier.find(w, at), how[0]
        phase = barrier.phase - 1 if parity else value
        w.profile.passed_mbarrier(w, fr, barrier, phase if barrier.passed(value, parity) else -1)
    return going


def _blocked(fr, going: int, pc: int) -> bool:
    """Whether a fragment has stopped at pc, to execute the instruction there once more."""
    return going < 0 and fr.state == WAITING and fr.pc == pc


@instruments(sync.barrier)
def _named_barrier(w, fr, number, count, arrive, pc, after):
    i = int(w.active(number, fr.mask)[0])
    w.profile.begin_meeting(w.cta, i)
    going = sync.barrier(w, fr, number, count, arrive, pc, after)
    w.profile.meet(w, fr, i, not arrive)
    return going


@instruments(sync.cluster_arrive)
def _cluster_arrive(w, fr, pc, after):
    w.profile.arrive_at_cluster(w, fr.mask, w.cluster.generation)
    return sync.cluster_arrive(w, fr, pc, after)


@instruments(sync.cluster_wait)
def _cluster_wait(w, fr, pc, after):
    going = sync.cluster_wait(w, fr, pc, after)
    if _blocked(fr, going, pc):
        w.profile.again(w, fr)
    else:
        w.profile.passed_cluster(w, fr, int(w.cluster_generation[fr.mask].max()))
    return going


@instruments(register_file.change)
def _setmaxnreg(w, fr, grows, count, pc, after):
    going = register_file.change(w, fr, grows, count, pc, after)
    if _blocked(fr, going, pc):
        w.profile.again(w, fr)
    return going


@instruments(fragments.leave)
def _leave(w, fr):
    going = fragments.leave(w, fr)
    w.profile.left(w, fr)
    return going
