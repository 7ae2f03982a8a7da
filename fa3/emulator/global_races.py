"""Check "global": accesses of different clusters to one byte of global memory, one of them a plain
write, that nothing orders.

Clusters are ordered by atomics (and by loads and stores with .acquire, .release, .relaxed,
.volatile, which count as such): what a cluster did before an atomic on some word, a cluster knows
after a later one on the same word.  Clusters run one after another here, but which two of them
meet in a byte does not depend on that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .checks import bytes_of
from .errors import Race
from .memory.places import Access, Place


class Event(NamedTuple):
    """An access: by the how-many-th cluster, after how many of its atomics, and where."""

    cluster: int
    epoch: int
    place: str


class _Shadow:
    """Of one region: events by number, 0 for none."""

    def __init__(self, nbytes: int):
        self.writes = np.zeros(nbytes, np.int32)
        self.reads = np.zeros(nbytes, np.int32)


class GlobalRaces:
    """Of one launch."""

    def __init__(self, launch):
        self._lowered = launch.lowered
        self._events: list[Event] = [Event(-1, 0, "")]
        self._numbers: dict[tuple, int] = {}
        self._shadows: dict[int, _Shadow] = {}  # by start of the region, once it is written
        self._reads: dict[int, list] = {}  # before that
        self._epochs: dict[int, int] = {}
        self._knows: dict[int, dict[int, int]] = {}  # cluster -> atomics of others it has heard of
        self._released: dict[int, dict[int, int]] = {}  # address -> what an atomic there tells

    def synchronise(self, w, addresses) -> None:
        """An atomic on these addresses."""
        me = w.cluster.number
        knows = self._knows.setdefault(me, {})
        for address in set(addresses.tolist()):
            _join(knows, self._released.get(address, {}))
        self._epochs[me] = self._epochs.get(me, 0) + 1
        for address in set(addresses.tolist()):
            told = self._released.setdefault(address, {})
            _join(told, knows)
            told[me] = self._epochs[me]

    def access(self, w, region, where: Place, writes: bool, site: int | None = None) -> None:
        """A plain access to bytes of a region, by the instruction at site or the one that runs."""
        pc = self._lowered.pc_here() if site is None else site
        self.note(w.cluster.number, Access(region.start, len(region.bytes), where, writes, pc))

    def note(self, cluster: int, access: Access) -> None:
        start, nbytes, where, writes, pc = access
        number = self._event(cluster, pc)
        shadow = self._shadows.get(start)
        if not writes and shadow is None:
            self._reads.setdefault(start, []).append((where, number))
            return
        if shadow is None:
            shadow = self._shadows[start] = _Shadow(nbytes)
            for earlier, its_number in self._reads.pop(start, ()):
                earlier.put(shadow.reads, its_number)
        self._require(shadow.writes, where, number, start, "writes" if writes else "reads")
        if writes:
            self._require(shadow.reads, where, number, start, "writes")
        where.put(shadow.writes if writes else shadow.reads, number)

    def _event(self, me: int, pc: int) -> int:
        key = me, self._epochs.get(me, 0), pc
        if key not in self._numbers:
            self._numbers[key] = len(self._events)
            self._events.append(Event(*key[:2], self._lowered.place(pc)))
        return self._numbers[key]

    def _require(self, cells, where: Place, mine: int, start: int, does: str) -> None:
        numbers = where.of(cells)
        if not numbers.any():
            return
        me = self._events[mine].cluster
        for number in np.unique(numbers).tolist():
            other = self._events[number]
            if number == 0 or other.cluster == me:
                continue
            if self._knows.get(me, {}).get(other.cluster, 0) <= other.epoch:
                at = where.flat()[np.ravel(numbers) == number]
                place = bytes_of(start + int(at[0]), start + at, 1)
                raise Race(
                    f"cluster {me} of the grid {does} global memory {place} (from byte {at[0]} of "
                    f"the tensor on) that cluster {other.cluster} accesses at {other.place}, one "
                    "of them writing: no atomic leads from one to the other"
                )


def _join(into: dict[int, int], other: dict[int, int]) -> None:
    for key, value in other.items():
        into[key] = max(into.get(key, 0), value)
