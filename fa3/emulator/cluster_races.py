"""Checks "race" and "global" together: accesses to global memory by the warps of one cluster.

As in races.py, whose clocks order them, bulk copies included; with a shadow of bytes, as threads
often write halves of a word.  Atomics (and accesses with .acquire, .release, .relaxed, .volatile)
order each other, whatever their address.  A thread may write what is there already, as when all
threads of a CTA store one number: no order changes that.
"""

from __future__ import annotations

import numpy as np

from .checks import bytes_of
from .clocks import Access, joined
from .memory.places import Place, indices
from .races import Races

_PART = 22  # bits of an offset into a part of a region: tensors may be larger than memory


class _Shadow:
    """Of a part of a region: the last write of each byte and the reads since, as races.Shadow."""

    fenced = None

    def __init__(self, start: int, before: int, nbytes: int):
        """start: address of the region.  before: bytes of it before the part."""
        self.start, self.before = start, before
        self.values = np.zeros(nbytes, np.uint8)  # as the last write left them
        self.writes = np.zeros(nbytes, np.int64)
        self.reads: list[np.ndarray] = []

    def named(self, first: int, others) -> str:
        at = self.start + self.before
        place = bytes_of(at + first, at + others.astype(np.int64), 1)
        return f"global memory {place} (from byte {self.before + first} of the tensor on)"


class ClusterRaces:
    def __init__(self, races: Races):
        self._races = races
        self._shadows: dict[tuple[int, int], _Shadow] = {}  # by start of the region and part
        self._written: set[int] = set()  # regions, by start
        self._reads: dict[int, list[tuple[Place, Access]]] = {}  # of those that are not, yet
        self._atomics: np.ndarray | None = None  # what they pass on

    def plain(self, region, offsets, nbytes: int, threads, values=None) -> None:
        """Accesses to nbytes at offsets of a region by threads (arrays of one shape).

        values: (threads, nbytes) bytes that are about to be written; None for loads.
        """
        for _, mine, access in self._races.by_warp(threads):
            written = None if values is None else values[mine].ravel()
            where = indices(offsets[mine], nbytes)
            self.access(region, where, values is not None, access, written)

    def access(self, region, where: Place, writes: bool, access: Access, values=None) -> None:
        """values: bytes that are about to be written; None: they are there, or it is a load."""
        start = region.start
        if writes and start not in self._written:
            self._written.add(start)
            for its_place, earlier in self._reads.pop(start, ()):
                for shadow, _, at in self._parts(region, its_place.flat()):
                    self._races.read(shadow, at, earlier)
        if start not in self._written:
            kept = access._replace(clock=access.clock.copy())
            self._reads.setdefault(start, []).append((where, kept))
            return
        offsets = where.flat()
        for shadow, mine, at in self._parts(region, offsets):
            if writes:
                there = region.bytes[offsets[mine]]
                self._write(shadow, at, access, there, None if values is None else values[mine])
            else:
                self._races.read(shadow, at, access)

    def _write(self, shadow: _Shadow, at, access: Access, there, values) -> None:
        """there: the bytes in memory."""
        changed = None
        if values is not None:  # lanes of one instruction may have written since
            old = np.where(shadow.writes[at] != 0, shadow.values[at], there)
            changed = at[old != values]
        self._races.write(shadow, at, access, changed)
        shadow.values[at] = there if values is None else values

    def _parts(self, region, offsets):
        """(shadow, those of the offsets that lie there, where in it they lie)"""
        parts = offsets >> _PART
        for part in [int(parts[0])] if (parts == parts[0]).all() else np.unique(parts).tolist():
            mine = parts == part
            key = region.start, part
            if key not in self._shadows:
                before = part << _PART
                nbytes = min(len(region.bytes) - before, 1 << _PART)
                self._shadows[key] = _Shadow(region.start, before, nbytes)
            yield self._shadows[key], mine, offsets[mine] & (1 << _PART) - 1

    def synchronise(self, w, lanes: np.ndarray) -> None:
        """Atomics by these lanes of a warpgroup."""
        self._races.learn(w, lanes, self._atomics)
        for agent, mine in self._races.by_agent(w, lanes):
            told = self._races.release([agent], w.threads[mine])
            self._atomics = joined(self._atomics, told)
