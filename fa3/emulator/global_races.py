"""Check "global": accesses of different clusters to one byte of global memory, one of them a plain
write, that nothing orders.  Check "sums": additions to one number that nothing orders.

Atomics order clusters, and loads and stores with .acquire, .release, .relaxed or .volatile, which
count as such (device_order.py).  Without the check "race", which knows the warps of a cluster, an
atomic passes on what its whole cluster did before.  Clusters run one after another here, but which
two of them meet in a byte does not depend on that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .checks import bytes_of
from .clocks import PC, unknown
from .device_order import DeviceOrder
from .errors import Race
from .lowering.memory import communicates
from .memory.places import Access, Place


class Event(NamedTuple):
    """An access: by the how-many-th cluster; its epoch (clocks.py), or after how many of the
    cluster's atomics; and where."""

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
        talks = any(communicates(i) for i in launch.kernel.code)
        # what the clusters tell each other, by warps; None: nothing, or by clusters
        self.order = DeviceOrder() if talks and launch.checks.race else None
        self._events: list[Event] = [Event(-1, 0, "")]
        self._numbers: dict[tuple, int] = {}
        self._shadows: dict[int, _Shadow] = {}  # by start of the region, once it is written
        self._reads: dict[int, list] = {}  # before that
        self._epochs: dict[int, int] = {}
        self._knows: dict[int, dict[int, int]] = {}  # cluster -> atomics of others it has heard of
        self._released: dict[int, dict[int, int]] = {}  # address -> what an atomic there tells
        self._sums: dict[int, np.ndarray] = {}  # by start of the region: of the last addition

    def synchronise(self, w, lanes, addresses, acquires: bool, releases: bool) -> None:
        """An atomic of these lanes of a warpgroup, on an address each."""
        if self.order is not None:
            for agent, own in w.cluster.races.by_agent(w, lanes):
                its = set(addresses[np.isin(lanes, own)].tolist())
                order = acquires, releases
                self.order.atomic(w.cluster, agent, w.threads[own], its, *order)
            return
        me = w.cluster.number
        knows = self._knows.setdefault(me, {})
        for address in set(addresses.tolist()):
            _join(knows, self._released.get(address, {}))
        self._epochs[me] = self._epochs.get(me, 0) + 1
        for address in set(addresses.tolist()):
            told = self._released.setdefault(address, {})
            _join(told, knows)
            told[me] = self._epochs[me]

    def fence(self, w, lanes) -> None:
        """fence.acq_rel or the like, of these lanes."""
        if self.order is not None:
            for agent, own in w.cluster.races.by_agent(w, lanes):
                self.order.fence(w.cluster, agent, w.threads[own])

    def access(
        self, w, region, where: Place, writes: bool, site: int | None = None, operation=None
    ) -> None:
        """A plain access to bytes of a region, by the instruction at site or the one that runs.

        operation: the clocks.Access that it belongs to; where there is an order.
        """
        pc = self._lowered.pc_here() if site is None else site
        access = Access(region.start, len(region.bytes), where, writes, pc)
        self.note(w.cluster.number, access, operation)

    def add(self, w, region, words: np.ndarray, operation) -> None:
        """Check "sums": an addition to these words of a region."""
        if region.start not in self._sums:
            self._sums[region.start] = np.zeros(len(region.bytes) + 3 >> 2, np.int32)
        me, sums = w.cluster.number, self._sums[region.start]
        mine = self._event(me, operation.epoch & PC, operation)
        numbers = sums[words]
        for number in np.unique(numbers[numbers != mine]).tolist():
            if number and not self._is_known(self._events[number], me, operation):
                other = self._events[number]
                at = words[numbers == number]
                first = (region.start >> 2) + int(at[0])
                place = bytes_of(first, (region.start >> 2) + at)
                raise Race(
                    f"cluster {me} of the grid adds to global memory {place} (from byte "
                    f"{4 * at[0]} of the tensor on) unordered with the addition by cluster "
                    f"{other.cluster} at {other.place}: the sum depends on which comes first"
                )
        sums[words] = mine

    def note(self, cluster: int, access: Access, operation=None) -> None:
        start, nbytes, where, writes, pc = access
        number = self._event(cluster, pc, operation)
        shadow = self._shadows.get(start)
        if not writes and shadow is None:
            self._reads.setdefault(start, []).append((where, number))
            return
        if shadow is None:
            shadow = self._shadows[start] = _Shadow(nbytes)
            for earlier, its_number in self._reads.pop(start, ()):
                earlier.put(shadow.reads, its_number)
        mine = self._events[number].cluster, operation
        self._require(shadow.writes, where, mine, start, "writes" if writes else "reads")
        if writes:
            self._require(shadow.reads, where, mine, start, "writes")
        where.put(shadow.writes if writes else shadow.reads, number)

    def _event(self, me: int, pc: int, operation) -> int:
        key = me, self._epochs.get(me, 0) if operation is None else operation.epoch, pc
        if key not in self._numbers:
            self._numbers[key] = len(self._events)
            self._events.append(Event(*key[:2], self._lowered.place(pc)))
        return self._numbers[key]

    def _is_known(self, other: Event, me: int, operation) -> bool:
        if self.order is None:
            return other.cluster == me or (
                self._knows.get(me, {}).get(other.cluster, 0) > other.epoch
            )
        if other.cluster == me:
            return not unknown(np.int64(other.epoch), operation.clock)
        return self.order.knows(me, operation.clock, other.cluster, other.epoch)

    def _require(self, cells, where: Place, mine: tuple, start: int, does: str) -> None:
        """mine: cluster, and Access if there is an order."""
        numbers = where.of(cells)
        if not numbers.any():
            return
        me, operation = mine
        for number in np.unique(numbers).tolist():
            other = self._events[number]
            # those of one cluster are cluster_races.py's
            if number == 0 or other.cluster == me or self._is_known(other, me, operation):
                continue
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
