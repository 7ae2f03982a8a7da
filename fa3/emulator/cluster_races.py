"""Checks "race" and "global" together: accesses to global memory by the warps of one cluster.

As in races.py, whose clocks order them, bulk copies included; with a shadow of bytes, as threads
often write halves of a word.  Atomics (and accesses with .acquire, .release, .relaxed, .volatile)
order each other, whatever their address.  A thread may write what is there already, as when all
threads of a CTA store one number: no order changes that.
"""

from __future__ import annotations

import numpy as np

from .checks import bytes_of
from .memory.places import Place, indices
from .races import Access, Races, joined


class _Shadow:
    """The last write of each byte of a region, and the reads since: epochs, as in races.Shadow."""

    fenced = None

    def __init__(self, region):
        nbytes = region.end - region.start
        self.start = region.start
        self.numbers = np.arange(nbytes, dtype=np.int32)
        self.values = region.bytes.copy()  # as the last write left them
        self.writes = np.zeros(nbytes, np.int64)
        self.reads: list[np.ndarray] = []

    def named(self, first: int, others) -> str:
        place = bytes_of(self.start + first, self.start + others.astype(np.int64), 1)
        return f"global memory {place} (from byte {first} of the tensor on)"


class ClusterRaces:
    def __init__(self, races: Races):
        self._races = races
        self._shadows: dict[int, _Shadow] = {}  # by start of the region, once it is written
        self._reads: dict[int, list[tuple[Place, Access]]] = {}  # before that
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
        shadow = self._shadows.get(region.start)
        if shadow is None:
            if not writes:
                kept = access._replace(clock=access.clock.copy())
                self._reads.setdefault(region.start, []).append((where, kept))
                return
            shadow = self._shadows[region.start] = _Shadow(region)
            for its_place, earlier in self._reads.pop(region.start, ()):
                self._races.read(shadow, np.ravel(its_place.of(shadow.numbers)), earlier)
        at = np.ravel(where.of(shadow.numbers))
        if not writes:
            return self._races.read(shadow, at, access)
        changed = at if values is None else at[shadow.values[at] != values]
        self._races.write(shadow, at, access, changed)
        shadow.values[at] = region.bytes[at] if values is None else values

    def synchronise(self, w, lanes: np.ndarray) -> None:
        """Atomics by these lanes of a warpgroup."""
        self._races.learn(w, lanes, self._atomics)
        for warp in np.unique(lanes // 32).tolist():
            mine = lanes[lanes // 32 == warp]
            agents = self._races.agents(w, np.arange(w.lanes) // 32 == warp)
            told = self._races.release(agents, w.threads[mine])
            self._atomics = joined(self._atomics, told)
