"""cp.async.bulk[.tensor] and cp.reduce.async.bulk[.tensor]: the async proxy's copies (TMA).

Loads and stores complete at once or, as the schedule says, later: loads at any time, stores up to
the wait_group that covers them.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..errors import Misaligned, OutOfBounds, Unsupported
from . import mbarrier, tensormap
from .operations import Operation
from .places import observe, observe_sum, span
from .shared import OFFSET, RANK_SHIFT, SharedMemory, shared_at

_CHUNK = 16  # bytes; swizzles permute chunks
_REDUCIBLE = {
    "f32": np.float32,
    "f16": np.float16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "f64": np.float64,
}


def swizzled_chunks(start: int, nbytes: int, mask: int) -> np.ndarray:
    """Indices of the 16-byte chunks of [start, start + nbytes), in logical order.

    The hardware swizzles absolute shared-memory addresses: chunk index c becomes
    c ^ (c >> 3 & mask), with mask 1, 3, 7 for swizzles of 32, 64, 128 bytes.
    """
    chunk = np.arange(start // _CHUNK, (start + nbytes) // _CHUNK)
    return chunk ^ ((chunk >> 3) & mask) if mask else chunk


def _words(start: int, nbytes: int) -> slice:
    return slice(start >> 2, (start + nbytes) >> 2)


def _deliver(memory: SharedMemory, at: int, raw, mask: int) -> None:
    """Bytes arrive in shared memory through the async proxy."""
    n = len(raw)
    if at + n > memory.size:
        raise OutOfBounds(f"bulk copy to {at:#x}..{at + n:#x} outside shared memory")
    if n % _CHUNK == 0:
        memory.chunks[swizzled_chunks(at, n, mask)] = raw.view(np.uint64).reshape(-1, 2)
    else:
        memory.raw[at : at + n] = raw
    memory.async_write(_words(at, n))


def _collect(memory: SharedMemory, at: int, nbytes: int, mask: int, what: str) -> np.ndarray:
    """Bytes leave shared memory through the async proxy."""
    if at + nbytes > memory.size:
        raise OutOfBounds(f"{what} from {at:#x} reaches outside shared memory")
    if memory.tracked:
        memory.async_read(np.arange(at >> 2, (at + nbytes) >> 2), what)
    if nbytes % _CHUNK:
        return memory.raw[at : at + nbytes].copy()
    return memory.chunks[swizzled_chunks(at, nbytes, mask)].reshape(-1).view(np.uint8)


def destinations(w, dst: int, barrier: int, multicast: int | None):
    """[(memory, offset, mbarrier address)] a load is delivered to."""
    if multicast is None:
        return [(*shared_at(w, dst), barrier)]
    return [
        (w.cluster.peer(rank + 1), dst & OFFSET, (barrier & OFFSET) | (rank + 1) << RANK_SHIFT)
        for rank in range(16)
        if multicast >> rank & 1
    ]


def tensor_load(w, m, site, dst, dst_offset, source, barrier, barrier_offset, multicast):
    """cp.async.bulk.tensor global -> shared; source is (tensor map address, [coordinates])."""
    address, coords = source
    for lane in w.lane_list(m):
        box = tensormap.find(w, w.lane_value(address, lane))
        c = [w.lane_value(x, lane) for x in coords]
        d = w.lane_value(dst, lane) + dst_offset
        b = w.lane_value(barrier, lane) + barrier_offset
        mask = None if multicast is None else w.lane_value(multicast, lane)
        mbarrier.find(w, b)
        work = partial(_tensor_load, w, site, box, c, d, b, mask)
        _issue_load(w, lane, site, "TMA load", work, destinations(w, d, b, mask), box.box_bytes)


def _issue_load(w, lane: int, site: int, what: str, work, targets, nbytes: int) -> None:
    """work takes its access as an argument (check "race")."""
    spans = [(memory, at, at + nbytes, True) for memory, at, _ in targets]
    mask = np.arange(w.lanes) == lane
    access = _raced(w, mask, "load", what, spans, site)
    operation = Operation(w, site, mask, what, spans, partial(work, access), _clock(access))
    w.cluster.issue(operation, waited_for=False)


def _raced(w, mask, kind: str, what: str, spans, site: int | None):
    """Check "race": the access of an operation to these spans."""
    if w.races is None:
        return None
    access = w.races.begin(w, mask, kind, what, site)
    for memory, low, high, writes in spans:
        (w.races.span_write if writes else w.races.span_read)(memory, low, high, access)
    return access


def _clock(access):
    return None if access is None else access.clock


def _tensor_load(w, site, box, coords, dst, barrier, multicast, access):
    seen = [] if w.launch.read_observer is not None else None
    raw = box.read(coords, seen)
    for place in seen or ():
        observe(w, *place, False, site, access)
    for memory, at, bar in destinations(w, dst, barrier, multicast):
        if at % (128 if box.swizzle else 16):
            raise Misaligned(f"TMA destination {at:#x}")
        _deliver(memory, at, raw, box.swizzle)
        if w.checks.box:
            mbarrier.find(w, bar).note(box, coords, w, site)
        mbarrier.complete(w, bar, len(raw), _clock(access))


def tensor_store(w, m, site, target, src, src_offset, reduction):
    """cp[.reduce].async.bulk.tensor shared -> global; target is (tensor map, [coordinates])."""
    address, coords = target
    seen: dict[tuple, Operation | None] = {}
    for lane in w.lane_list(m):
        box = tensormap.find(w, w.lane_value(address, lane))
        c = tuple(w.lane_value(x, lane) for x in coords)
        at = (w.lane_value(src, lane) + src_offset) & OFFSET
        same = (box.address, c, at, lane // 32)
        if reduction is None and same in seen:  # every lane of a warp storing the same box
            if seen[same] is not None:
                w.bulk.add(lane, seen[same])
                seen[same].lanes.append(lane)
            continue
        work = partial(_tensor_store, w, site, box, c, at, reduction)
        seen[same] = _issue_store(w, lane, site, "TMA store", work, at, box.box_bytes)


def _tensor_store(w, site, box, coords, at, reduction, access):
    raw = _collect(w.cta.smem, at, box.box_bytes, box.swizzle, "TMA store")
    seen = [] if w.launch.write_observer is not None else None
    box.write(coords, raw, reduction, seen)
    for place in seen or ():
        observe(w, *place, True, site, access)
    w.cluster.events += 1


def _issue_store(w, lane: int, site: int, what: str, work, at: int, nbytes: int):
    """Complete now or, as the schedule says, up to the wait for the lane's bulk group.

    work as in _issue_load().
    """
    if not w.groups_kept:
        work(None)
        return None
    spans = [(w.cta.smem, at, at + nbytes, False)]
    mask = np.arange(w.lanes) == lane
    access = _raced(w, mask, "store", what, spans, site)
    operation = Operation(w, site, mask, what, spans, partial(work, access), _clock(access))
    operation.lanes.append(lane)
    w.bulk.add(lane, operation)
    w.cluster.issue(operation, waited_for=True)
    return operation


def load(w, m, site, dst, dst_offset, source, barrier, barrier_offset, multicast):
    """cp.async.bulk global -> shared; source is (address, offset, bytes)."""
    src, src_offset, size = source
    for lane in w.lane_list(m):
        d, s = w.lane_value(dst, lane) + dst_offset, w.lane_value(src, lane) + src_offset
        b, n = w.lane_value(barrier, lane) + barrier_offset, w.lane_value(size, lane)
        mask = None if multicast is None else w.lane_value(multicast, lane)
        if s % 16 or n % 16 or d % 16:
            raise Misaligned(
                f"cp.async.bulk of {n} bytes from {s:#x} to {d:#x}: addresses and "
                "size must be multiples of 16"
            )
        work = partial(_load, w, site, d, s, n, b, mask)
        _issue_load(w, lane, site, "bulk load", work, destinations(w, d, b, mask), n)


def _load(w, site, dst, src, nbytes, barrier, multicast, access):
    region = w.memory.find(src, src + nbytes, "bulk read")
    raw = region.bytes[src - region.start : src - region.start + nbytes].copy()
    if w.launch.read_observer is not None:
        observe(w, region, span(src - region.start, nbytes), False, site, access)
    for memory, at, bar in destinations(w, dst, barrier, multicast):
        _deliver(memory, at, raw, 0)
        mbarrier.complete(w, bar, nbytes, _clock(access))


def between_ctas(w, m, dst, dst_offset, src, src_offset, size, barrier, barrier_offset):
    """cp.async.bulk shared::cta -> shared::cluster"""
    for lane in w.lane_list(m):
        d, s = w.lane_value(dst, lane) + dst_offset, w.lane_value(src, lane) + src_offset
        b, n = w.lane_value(barrier, lane) + barrier_offset, w.lane_value(size, lane)
        targets = destinations(w, d, b, None)
        spans = [(w.cta.smem, s & OFFSET, (s & OFFSET) + n, False)]
        spans += [(memory, at, at + n, True) for memory, at, _ in targets]
        access = _raced(w, np.arange(w.lanes) == lane, "load", "bulk copy", spans, None)
        raw = _collect(w.cta.smem, s & OFFSET, n, 0, "bulk copy")
        for memory, at, bar in targets:
            _deliver(memory, at, raw, 0)
            mbarrier.complete(w, bar, n, _clock(access))


def store(w, m, site, dst, dst_offset, src, src_offset, size, reduction):
    """cp[.reduce].async.bulk shared -> global; reduction is (operation, PTX type) or None."""
    for lane in w.lane_list(m):
        d, s = w.lane_value(dst, lane) + dst_offset, w.lane_value(src, lane) + src_offset
        n = w.lane_value(size, lane)
        work = partial(_store, w, site, d, s & OFFSET, n, reduction)
        _issue_store(w, lane, site, "bulk store", work, s & OFFSET, n)


def _store(w, site, dst, at, nbytes, reduction, access):
    raw = _collect(w.cta.smem, at, nbytes, 0, "bulk store")
    region = w.memory.find(dst, dst + nbytes, "bulk write")
    out = region.bytes[dst - region.start : dst - region.start + nbytes]
    w.cluster.events += 1
    if reduction is None:
        out[:] = raw
        observe(w, region, span(dst - region.start, nbytes), True, site, access)
        return
    op, kind = reduction
    if op != "add" or kind not in _REDUCIBLE:
        raise Unsupported(f"bulk reduction {op} {kind}")
    if kind in ("f32", "f16", "f64"):
        observe_sum(w, region, span(dst - region.start, nbytes), access)
    out = out.view(_REDUCIBLE[kind])
    out += raw.view(out.dtype)


def commit(w, m):
    for lane in w.lane_list(m) if w.groups_kept else ():
        w.bulk.commit(lane)


def wait(w, m, keep):
    waited: dict[Operation, list[int]] = {}
    for lane in w.lane_list(m) if w.groups_kept else ():
        for operation in w.bulk.drain(lane, keep):
            waited.setdefault(operation, []).append(lane)
    for operation, lanes in waited.items() if w.races is not None else ():
        if len(operation.lanes) > 1:
            w.races.learn_shared(w, np.array(lanes), operation)
        else:
            w.races.learn(w, np.array(lanes), operation.clock)


def store_async(w, m, dtype, rows, address, offset, barrier, barrier_offset):
    """st.async: a store to a peer's shared memory that completes a transaction."""
    from . import shared

    shared.store(w, m, dtype, rows, address, offset)
    nbytes = np.dtype(dtype).itemsize * len(rows)
    mbarrier.pass_on(w, m, barrier, barrier_offset)
    for b in (w.active(barrier, m).astype(np.int64) + barrier_offset).tolist():
        mbarrier.complete(w, b, nbytes)
