"""Vector clocks of the warps of one cluster, for the check "race" (races.py).

Every warp is an agent with a clock, and so is every asynchronous operation between its issue and
the wait that observes it: it is ordered after what its issuer knew, and before what comes after a
wait on its mbarrier or group.  mbarriers, named barriers, the cluster barrier, atomics and those
waits pass clocks on.

An epoch is an access in one number: agent << 52 | time of the agent << 24 | pc.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

AGENT, TIME, PC = 52, 24, (1 << 24) - 1
_TIMES = (1 << 28) - 1
_BIT = 1 << np.arange(32)
_ASYNCHRONOUS = 256  # agents for operations in flight at once, of a cluster
_FEW = 1024  # epochs that are looked at one by one


class Access(NamedTuple):
    """Who accesses: what it knows, its epoch, and its name."""

    clock: np.ndarray
    epoch: int
    who: str


class Clocks:
    """What the agents of a cluster know of each other."""

    def __init__(self, cluster):
        launch = cluster.launch
        self._lowered = launch.lowered
        self._warps = (launch.threads + 31) // 32  # of a CTA
        self._count = count = self._warps * int(np.prod(launch.cluster))
        # a column per warp, per operation in flight, and per warp for its fence.proxy.async
        self._fences = count + _ASYNCHRONOUS
        self.clocks = np.zeros((count, self._fences + count), np.int64)
        self.clocks[np.arange(count), np.arange(count)] = 1
        self._times = np.zeros(count + _ASYNCHRONOUS, np.int64)  # of asynchronous agents
        self._agents: dict[tuple, list[int]] = {}  # (kind, warps) -> asynchronous agents
        self._names: dict[int, tuple[str, str]] = {}  # asynchronous agent -> kind, name
        # Lanes of a warp know of each other what they did up to the last time they met.
        self._apart: dict[int, dict[int, np.ndarray]] = {}  # warp -> what single threads know more
        self._met = np.zeros(count, np.int64)  # own time of each warp then
        self._since = [0] * count  # lanes with accesses since, as bits
        self._fences_met = np.zeros(count, np.int64)  # as _met and _since, of fences
        self._fenced_since = [0] * count
        # warp -> operations that its lanes share, and the lanes that have waited
        self._shared: dict[int, dict] = {}

    # agents

    def agents(self, w, m) -> list[int]:
        """The warps of a warpgroup with an active lane."""
        return [self._warps * w.cta.rank + warp for warp in w.warps(m)]

    def by_agent(self, w, lanes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(warp, those of the lanes of a warpgroup that are its)"""
        warps = lanes >> 5
        for warp in sorted(set(warps.tolist())):
            yield self._warps * w.cta.rank + 4 * w.index + warp, lanes[warps == warp]

    def _of_threads(self, threads) -> np.ndarray:
        return threads // 1024 * self._warps + threads % 1024 // 32

    def _name(self, agent: int) -> str:
        if agent >= self._count:
            return self._names[agent][1]
        of_cta = (
            f" of CTA {agent // self._warps} of the cluster" if self._count > self._warps else ""
        )
        return f"warp {agent % self._warps}{of_cta}"

    # order

    def release(self, agents: list[int], threads=None) -> np.ndarray:
        """What these warps know; what they do from now on is not part of it.

        threads: those of one warp that pass it on, default all.
        """
        clock = self.clocks[agents].max(0)
        if threads is not None and self._apart.get(agents[0]):
            for thread in threads.tolist():
                clock = joined(clock, self._apart[agents[0]].get(thread))
        if threads is not None:
            clock = self._without_others(agents[0], threads, clock)
        self.clocks[agents, agents] += 1
        return clock

    def acquire(self, agents: list[int], clock: np.ndarray | None) -> None:
        if clock is not None:
            for agent in agents:
                self._heard(agent, clock)
                np.maximum(self.clocks[agent], clock, out=self.clocks[agent])

    def learn(self, w, lanes, clock: np.ndarray | None) -> None:
        """These lanes have waited for something; the others of a warp know it once they meet."""
        if clock is None:
            return
        if len(lanes) == np.count_nonzero(w.live):
            return self.acquire(self.agents(w, w.live), clock)
        for agent, own in self.by_agent(w, lanes):
            first = int(own[0]) & ~31
            live = int(np.count_nonzero(w.live[first : first + 32]))
            if len(own) == live:
                self.acquire([agent], clock)
                continue
            self._heard(agent, clock)
            apart = self._apart.setdefault(agent, {})
            for thread in w.threads[own].tolist():
                apart[thread] = joined(apart.get(thread), clock)
            if len(apart) == live:
                self.acquire([agent], np.min(list(apart.values()), axis=0))

    def learn_shared(self, w, lanes, operation) -> None:
        """As learn(), of an operation of which every lane issued a part and waits for that alone:
        it is over when all have waited and met."""
        for agent, own in self.by_agent(w, lanes):
            waited = self._shared.setdefault(agent, {}).setdefault(operation, set())
            waited.update(own.tolist())

    def _heard(self, agent: int, clock: np.ndarray) -> None:
        """Lanes of a warp that wait for what others of it have passed on are ordered after them."""
        if clock[agent] > self._met[agent]:
            self._lanes_met(agent)

    def _lanes_met(self, agent: int) -> None:
        """The lanes of a warp know what each of them did: for the subclass."""

    def meet(self, agents: list[int]) -> None:
        """The lanes of these warps tell each other what they know."""
        for agent in agents:
            self._lanes_met(agent)
            self._met[agent] = self.clocks[agent, agent]
            self.clocks[agent, agent] += 1
            self._since[agent] = self._fenced_since[agent] = 0
            for clock in self._apart.pop(agent, {}).values():
                self.acquire([agent], clock)
            self._fences_met[agent] = self.clocks[agent, self._fences + agent]
            shared = self._shared.get(agent, {})
            for operation in [o for o, waited in shared.items() if waited.issuperset(o.lanes)]:
                self.acquire([agent], operation.clock)
                del shared[operation]

    def _without_others(self, agent: int, threads, clock):
        """The clock that some threads of a warp pass on: not what its others did since they met."""
        for column, since, met in (
            (agent, self._since, self._met),
            (self._fences + agent, self._fenced_since, self._fences_met),
        ):
            if since[agent] and since[agent] & ~lanes_of(threads):
                clock = clock.copy()
                clock[column] = met[agent]
        return clock

    def _known(self, agent: int, threads) -> np.ndarray:
        """The clock of some lanes of a warp."""
        clock = self.clocks[agent]
        apart = self._apart.get(agent)
        if apart is None:
            return clock
        own = [joined(clock, apart.get(thread)) for thread in set(threads.tolist())]
        return np.min(own, axis=0)

    def begin(self, w, m, kind: str, what: str, site: int | None = None) -> Access:
        """Start an asynchronous operation of the warps in m: it knows what all of them know."""
        warps = self.agents(w, m)
        clock = self.clocks[warps].min(0)
        if len(warps) == 1:
            threads = w.threads if m is None else w.threads[m]
            if warps[0] in self._apart:
                clock = self._known(warps[0], threads).copy()
            clock = self._without_others(warps[0], threads, clock)
        self.clocks[warps, warps] += 1
        own = self._agents.setdefault((kind, *warps), [])
        # One agent for operations of which each is known to be over when the next is issued.
        agent = next((a for a in own if clock[a] >= self._times[a]), None)
        if agent is None:
            used = sum(map(len, self._agents.values()))
            if used < _ASYNCHRONOUS:
                agent = self._count + used
                own.append(agent)
            else:  # more at once than there are agents: forget the oldest of this kind
                own = own or next(filter(None, self._agents.values()))
                agent = own[0]
            these = f"warp {warps[0] % self._warps}"
            if len(warps) > 1:
                these = f"warps {[x % self._warps for x in warps]}"
            self._names[agent] = kind, f"{what} of {these}"
        self._times[agent] += 1
        clock[agent] = self._times[agent]
        return Access(clock, self._epoch(agent, clock, site), self._names[agent][1])

    def _epoch(self, agent: int, clock, site: int | None) -> int:
        pc = self._lowered.pc_here() if site is None else site
        return agent << AGENT | (int(clock[agent]) & _TIMES) << TIME | pc

    def fenced(self, agent: int, threads) -> int:
        """Threads of a warp execute fence.proxy.async; returns the epoch of that."""
        self.clocks[agent, self._fences + agent] += 1
        self._fenced_since[agent] |= lanes_of(threads)
        return self._epoch(self._fences + agent, self.clocks[agent], None)

    def by_warp(self, threads) -> Iterator[tuple[int, np.ndarray, Access]]:
        """(warp, its part of the threads, their access) where threads make an access each."""
        agents = self._of_threads(threads)
        for agent in np.unique(agents).tolist():
            mine = agents == agent
            access = self._of_warp(agent, threads[mine])
            self._since[agent] |= lanes_of(threads[mine])
            yield agent, mine, access

    def _of_warp(self, agent: int, threads=None) -> Access:
        clock = self.clocks[agent] if threads is None else self._known(agent, threads)
        return Access(clock, self._epoch(agent, clock, None), self._name(agent))


def lanes_of(threads) -> int:
    """Threads of one warp as bits."""
    return int(np.bitwise_or.reduce(_BIT[threads & 31]))


def unknown(epochs, clock):
    return clock[epochs >> AGENT] < (epochs >> TIME & _TIMES)


def all_known(epochs, clock) -> bool:
    """Whether a clock knows all of these epochs; of many one of each run of equal ones will do."""
    if len(epochs) > _FEW:
        differs = np.empty(len(epochs), bool)
        differs[-1] = True
        np.not_equal(epochs[1:], epochs[:-1], out=differs[:-1])
        epochs = epochs[differs]
    return not unknown(epochs, clock).any()


def joined(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    """What is known of either clock."""
    if a is None or b is None:
        return b if a is None else a
    return np.maximum(a, b)
