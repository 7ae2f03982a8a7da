"""Communication inside a warp: elect, shfl, vote, match, redux."""

from __future__ import annotations

import numpy as np

from ..numerics.formats import rows

_u4, _u8 = np.uint32, np.uint64
_BITS = np.arange(32, dtype=_u8)


def _participants(w, m):
    return (w.live if m is None else m).reshape(-1, 32)


def elect(w, m):
    """elect.sync: (predicate, elected lane): the lowest live lane of each warp, or the highest.

    PTX promises only that it is always the same one.
    """
    lanes = _participants(w, m)
    highest = w.launch.schedule.elects_highest
    first = 31 - lanes[:, ::-1].argmax(1) if highest else lanes.argmax(1)
    chosen = np.zeros_like(lanes)
    chosen[np.arange(len(lanes)), first] = True
    return chosen.reshape(-1) & (w.all if m is None else m), np.repeat(first.astype(_u4), 32)


def shuffle_sources(mode: str, b, c, lanes: int):
    """(source lane, validity) of every lane for shfl.sync; b and c are numbers or rows."""
    lane, warp = np.arange(lanes) & 31, np.arange(lanes) & ~31
    b, c = np.asarray(b).astype(np.int64) & 31, np.asarray(c).astype(np.int64)
    segment, clamp = (c >> 8) & 31, c & 31
    highest = (lane & segment) | (clamp & ~segment & 31)
    if mode == "up":
        source = lane - b
        ok = source >= highest
    else:
        source = {"down": lane + b, "bfly": lane ^ b}.get(mode)
        if source is None:
            source = (lane & segment) | (b & ~segment & 31)
        ok = source <= highest
    return np.where(ok, source, lane) + warp, ok


def shuffle(w, m, mode, a, b, c):
    """shfl.sync with lane numbers known only at run time."""
    source, ok = shuffle_sources(mode, rows(b, w.lanes), rows(c, w.lanes), w.lanes)
    return rows(a, w.lanes)[source], ok


def vote(w, m, mode, predicate):
    active = _participants(w, m)
    p = rows(predicate, w.lanes).reshape(-1, 32)
    if mode == "ballot":
        v = ((p & active).astype(_u8) << _BITS).sum(1).astype(_u4)
    elif mode == "any":
        v = (p & active).any(1)
    elif mode == "all":
        v = (p | ~active).all(1)
    else:
        v = (p | ~active).all(1) | ~(p & active).any(1)
    return np.repeat(v, 32)


def match_any(w, m, a):
    active = _participants(w, m)
    x = rows(a, w.lanes).reshape(-1, 32)
    equal = (x[:, :, None] == x[:, None, :]) & active[:, None, :]
    return (equal.astype(_u8) << _BITS).sum(2).astype(_u4).reshape(-1)


def reduce(w, m, op, a):
    """redux.sync"""
    active = _participants(w, m)
    x = rows(a, w.lanes).reshape(-1, 32)
    limits = np.iinfo(x.dtype)
    f, neutral = {
        "add": (np.add, 0),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
        "and": (np.bitwise_and, ~x.dtype.type(0)),
        "min": (np.minimum, limits.max),
        "max": (np.maximum, limits.min),
    }[op]
    reduced = f.reduce(np.where(active, x, x.dtype.type(neutral)), axis=1, dtype=x.dtype)
    return np.repeat(reduced, 32)
