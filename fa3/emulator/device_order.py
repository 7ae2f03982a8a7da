"""Order between the clusters of a launch, as atomics and fences on global memory make it.

What a warp knows when it releases at an address, a warp of another cluster knows that acquires
there later, and by barriers the others of its cluster.

    release   .release or .acq_rel; or .relaxed after a fence of the warp
    acquire   .acquire or .acq_rel; or .relaxed or .volatile ahead of one

A fence is fence.acq_rel, fence.sc or membar for the whole GPU.  (PTX manual, memory consistency
model, release and acquire patterns.)  Which lane of a warp it was makes no difference here.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from .clocks import AGENT, TIME, joined

Known = dict[int, np.ndarray]  # cluster -> clock of its agents (clocks.py)
_TIMES = (1 << AGENT - TIME) - 1


class DeviceOrder:
    """Of one launch."""

    def __init__(self):
        self._told: dict[int, Known] = {}  # address -> what was released there
        # cluster -> warp -> its times when it heard something, and all that it had heard by then
        self._heard: dict[int, dict[int, tuple[list[int], list[Known]]]] = {}
        self._fenced: dict[tuple[int, int], Known] = {}  # what a warp knew at its last fence
        self._pending: dict[tuple[int, int], Known] = {}  # read relaxed since

    def fence(self, cluster, agent: int, threads) -> None:
        """These threads of a warp execute a fence."""
        who = cluster.number, agent
        self._hear(cluster, agent, self._pending.pop(who, {}))
        self._fenced[who] = self._knowledge(cluster, agent, threads)

    def atomic(self, cluster, agent: int, threads, addresses, acquires: bool, releases: bool):
        """These threads of a warp access these addresses (a set of them) strongly."""
        who = cluster.number, agent
        told = [self._told.get(address) for address in addresses]
        different = {id(x): x for x in told if x is not None}  # of many addresses few are
        for known in different.values():
            if acquires:
                self._hear(cluster, agent, known)
            else:
                _join(self._pending.setdefault(who, {}), known)
        passed = self._knowledge(cluster, agent, threads) if releases else self._fenced.get(who)
        if passed:
            joint = {key: _joined(known, passed) for key, known in different.items()}
            for address, before in zip(addresses, told, strict=True):
                self._told[address] = passed if before is None else joint[id(before)]

    def knows(self, cluster: int, clock: np.ndarray, other: int, epoch: int) -> bool:
        """Whether who has this clock, in a cluster, knows of an epoch of another cluster."""
        agent, time = epoch >> AGENT, epoch >> TIME & _TIMES
        for warp, (times, heard) in self._heard.get(cluster, {}).items():
            until = bisect_right(times, int(clock[warp]))
            if until:
                its_clock = heard[until - 1].get(other)
                if its_clock is not None and its_clock[agent] >= time:
                    return True
        return False

    def _knowledge(self, cluster, agent: int, threads) -> Known:
        clock = cluster.races.release([agent], threads)
        found: Known = {cluster.number: clock}
        for warp, (times, heard) in self._heard.get(cluster.number, {}).items():
            until = len(times) if warp == agent else bisect_right(times, int(clock[warp]))
            if until:
                _join(found, heard[until - 1])
        return found

    def _hear(self, cluster, agent: int, told: Known) -> None:
        of_cluster = self._heard.setdefault(cluster.number, {})
        times, heard = of_cluster.setdefault(agent, ([], []))
        before = heard[-1] if heard else {}
        news = {c: clock for c, clock in told.items() if c != cluster.number}
        if all(c in before and (before[c] >= clock).all() for c, clock in news.items()):
            return
        times.append(int(cluster.races.clocks[agent, agent]))
        heard.append(_joined(before, news))


def _join(into: Known, other: Known) -> None:
    for cluster, clock in other.items():
        into[cluster] = joined(into[cluster], clock) if cluster in into else clock


def _joined(a: Known, b: Known) -> Known:
    found = dict(a)
    _join(found, b)
    return found
