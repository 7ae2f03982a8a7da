"""bar.sync / bar.arrive (named barriers) and barrier.cluster; terminators, see fragments.py."""

from __future__ import annotations

from ..clocks import joined
from ..errors import BarrierMisuse
from ..numerics.formats import rows
from .fragments import AT_BARRIER, RUNNING

NUM_BARRIERS = 16


class _NamedBarrier:
    __slots__ = ("arrived", "expected", "held", "clock", "warps")

    def __init__(self):
        self.arrived = 0  # threads
        self.warps: list[int] = []  # that have arrived
        self.expected: int | None = None  # threads; None: all of the CTA
        self.held = []  # (fragment, warps as agents of the check "race") to release
        self.clock = None  # what it passes on (check "race")


class NamedBarriers:
    """Of one CTA, by number."""

    def __init__(self, races):
        self._races = races
        self._barriers: dict[int, _NamedBarrier] = {}

    def arrive(self, number: int, threads: int, expected: int | None) -> _NamedBarrier:
        if number >= NUM_BARRIERS:
            raise BarrierMisuse(f"named barrier {number}: there are {NUM_BARRIERS}")
        if expected is not None and (expected % 32 or expected == 0):
            raise BarrierMisuse(
                f"barrier {number}: thread count {expected} is not a multiple of the warp size"
            )
        b = self._barriers.setdefault(number, _NamedBarrier())
        if b.arrived and b.expected != expected:
            raise BarrierMisuse(
                f"barrier {number}: participants disagree on the thread count "
                f"({b.expected} and {expected})"
            )
        b.expected = expected
        b.arrived += threads
        return b

    def __contains__(self, number: int) -> bool:
        """Whether some have arrived at a barrier that is not complete."""
        return number in self._barriers

    def release(self, number: int, live: int) -> None:
        """Let the held fragments go if everyone has arrived."""
        b = self._barriers[number]
        want = b.expected if b.expected is not None else (live + 31) // 32 * 32
        if b.arrived > want:
            raise BarrierMisuse(
                f"barrier {number}: {b.arrived} threads arrived where {want} were expected"
            )
        if b.arrived == want:
            for f, agents in b.held:
                f.state = RUNNING
                if self._races is not None:
                    self._races.acquire(agents, b.clock)
            del self._barriers[number]

    def release_all(self, live: int) -> None:
        for number in list(self._barriers):
            self.release(number, live)


def barrier(w, fr, number, count, arrive, pc, after):
    """bar.sync, or bar.arrive which does not wait; count None: all threads of the CTA."""
    numbers = w.active(number, fr.mask)
    here = rows(number, w.lanes) == numbers[0]
    if count is not None:
        here &= rows(count, w.lanes) == w.active(count, fr.mask)[0]
    parted = bool((fr.mask & ~here).any())  # warps naming different barriers or counts
    if parted:
        w.fragments.append(fr.part(pc, fr.mask & ~here))
        fr.mask, fr.pc = fr.mask & here, after
    i = int(numbers[0])
    warps = int(fr.mask.reshape(-1, 32).any(1).sum())
    expected = None if count is None else int(w.active(count, fr.mask)[0])
    barriers, cta = w.cta.barriers, w.cta
    b = barriers.arrive(i, 32 * warps, expected)
    w.cluster.events += 1
    b.warps += w.warps(fr.mask)
    agents = w.races.agents(w, fr.mask) if w.races is not None else []
    if agents:
        w.races.meet(agents)
        b.clock = joined(b.clock, w.races.release(agents))
    if not arrive:
        fr.hold_at_barrier(
            pc,
            after,
            lambda: (
                f"barrier {i}: {b.arrived} of {b.expected or cta.live} threads arrived, those "
                f"of warps {sorted(b.warps)}; {(b.expected or cta.live) - b.arrived} are missing"
            ),
        )
        b.held.append((fr, agents))
    barriers.release(i, cta.live)
    return -1 if parted or fr.state == AT_BARRIER else after


def warp_sync(w, fr, after):
    """bar.warp.sync"""
    if w.races is not None:
        w.races.meet(w.races.agents(w, fr.mask))
    return after


def cluster_arrive(w, fr, pc, after):
    cluster = w.cluster
    if w.at_cluster_barrier[fr.mask].any():
        raise BarrierMisuse("barrier.cluster.arrive twice without a barrier.cluster.wait between")
    w.at_cluster_barrier[fr.mask] = True
    w.cluster_generation[fr.mask] = cluster.generation
    if w.races is not None:
        w.races.meet(w.races.agents(w, fr.mask))
        cluster.arriving = joined(cluster.arriving, w.races.release(w.races.agents(w, fr.mask)))
    cluster.arrived += int(fr.mask.sum())
    cluster.events += 1
    cluster.settle()
    return after


def cluster_wait(w, fr, pc, after):
    cluster = w.cluster
    if not w.at_cluster_barrier[fr.mask].all():
        raise BarrierMisuse("barrier.cluster.wait without a barrier.cluster.arrive before it")
    generation = int(w.cluster_generation[fr.mask].max())
    if cluster.generation > generation:
        w.at_cluster_barrier[fr.mask] = False
        if w.races is not None:
            w.races.acquire(w.races.agents(w, fr.mask), cluster.clock)
        return after
    fr.pc = pc
    fr.wait_until(lambda: cluster.generation > generation, lambda: "cluster barrier")
    return -1
