"""atom and red on shared and global memory; lanes act in order, which is one legal order."""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from ..numerics import halves
from ..numerics.reductions import REDUCTIONS
from . import generic, shared
from .places import indices, observe_sum

HALF = ("f16", "bf16", "f16x2", "bf16x2")
FLOAT = (*HALF, "f32", "f64")


def atomic(w, m, how, row, address, offset, b, c):
    """how is (space, operation, PTX type, dtype, generic.Strong); row gets the old values (None for
    red)."""
    if m is not None and not m.any():
        return
    space, op, kind, dtype, order = how
    es = np.dtype(dtype).itemsize
    if space == "global" and generic.window(w, m, address) == generic.SHARED:
        space, address = "shared", generic.shared_offset(address)
    if space == "shared":
        memory, a = shared.locate(w, m, address, offset, es)
        memory.generic_write(w, m, a, es, raced=False)
        if w.races is not None:
            w.races.atomic(memory, a, es, w.threads if m is None else w.threads[m])
        array, index = memory.view[dtype], a // es
    else:
        array, index = generic.locate(w, m, dtype, address, offset, es, "atomic")
        places = w.active(address, m).astype(np.int64) + offset
        generic.synchronise(w, m, places, *order)
        if w.checks.sums and op == "add" and kind in FLOAT:
            _observe_sums(w, m, places, es)
        if array is None:
            raise Unsupported("atomic whose lanes address different tensors")
    w.cluster.events += 1
    b = np.broadcast_to(w.active(b, m), index.shape)
    if row is None and op == "add" and kind not in HALF:
        return np.add.at(array, index, b)
    c = np.broadcast_to(w.active(c, m), index.shape) if c is not None else b
    old = np.empty(len(index), dtype)
    for i, j in enumerate(index.tolist()):
        old[i] = array[j]
        array[j] = _result(op, kind, old[i], b[i], c[i])
    if row is not None:
        row[slice(None) if m is None else m] = old


def _observe_sums(w, m, addresses, nbytes: int) -> None:
    threads = w.threads[w.lane_list(m)]
    addresses = np.broadcast_to(addresses, threads.shape)
    region = w.memory.find(int(addresses.min()), int(addresses.max()) + nbytes, "atomic")
    for _, mine, operation in w.races.by_warp(threads):
        observe_sum(w, region, indices(addresses[mine] - region.start, nbytes), operation)


def _result(op, kind, old, b, c):
    if op == "cas":
        return c if old == b else old
    if op == "exch":
        return b
    if op == "inc":
        return 0 if old >= b else old + 1
    if op == "dec":
        return b if old == 0 or old > b else old - 1
    if kind in HALF:
        return halves.apply(REDUCTIONS[op], kind, np.array([old]), np.array([b]))[0]
    return REDUCTIONS[op](old, b)
