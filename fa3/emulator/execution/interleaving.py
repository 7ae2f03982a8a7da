"""The random schedule of a cluster: which warps run next, and what completes meanwhile.

The odds change every now and then, so that a run has stretches in which one warpgroup races ahead,
loads are slow or come at once, or the warps of a warpgroup drift apart.  Lanes of one
warp meet again where they can, as without this schedule.
"""

from __future__ import annotations

import random

import numpy as np

from .fragments import FAR, RUNNING, WAITING, Fragment, merge, run_fragment


class _Odds:
    def __init__(self, rng: random.Random, warpgroups: int):
        self.steps = rng.choice((5, 30, 200))  # that these odds hold
        self.completion = rng.choice((0, 0.05, 0.3, 0.9))  # an operation completes
        self.spurious = rng.choice((0, 0, 0.05))  # a try_wait gives up
        self.split = rng.choice((0, 0.02, 0.1, 0.5))  # warps of a fragment part
        self.segments = rng.choice((1, 3, 1000))  # at most, that a fragment runs at a time
        self.weights = [rng.choice((0.01, 0.3, 1)) for _ in range(warpgroups)]


class Interleaving:
    def __init__(self, cluster):
        self._cluster = cluster
        self._running = cluster.warpgroups
        self._rng = random.Random(f"{cluster.launch.schedule.seed} {cluster.number}")
        self._odds = self._new_odds()

    def _new_odds(self) -> _Odds:
        return _Odds(self._rng, len(self._cluster.warpgroups))

    def run(self) -> None:
        cluster, rng = self._cluster, self._rng
        position = {id(w): i for i, w in enumerate(self._running)}
        while True:
            self._odds.steps -= 1
            if self._odds.steps < 0:
                self._odds = self._new_odds()
            self._running = [w for w in self._running if w.fragments]
            if not self._running:
                return
            cluster.check_limit()
            cluster.in_flight = [o for o in cluster.in_flight if not o.done]
            ready = [(w, f) for w in self._running for f in ready_of(w.fragments)]
            if cluster.in_flight and (not ready or rng.random() < self._odds.completion):
                cluster.land(rng.randrange(len(cluster.in_flight)))
            elif ready:
                weights = [self._odds.weights[position[id(w)]] for w, _ in ready]
                w, f = rng.choices(ready, weights)[0]
                cluster.step(w, lambda w=w, f=f: self._run(w, f))
                if rng.random() < self._odds.spurious:
                    cluster.time_out(rng.sample(self._running, 1))
            else:
                cluster.stall(self._running)

    def _run(self, w, fr: Fragment) -> None:
        if len(w.fragments) > 1:
            merge(w.fragments, fr)
        warps = np.flatnonzero(fr.mask.reshape(-1, 32).any(1)).tolist()
        if len(warps) > 1 and self._rng.random() < self._odds.split:
            self._part(w, fr, self._rng.sample(warps, self._rng.randrange(1, len(warps))))
        segments = self._rng.randint(1, self._odds.segments)
        run_fragment(w, fr, ahead_of(w.fragments, fr), segments)

    @staticmethod
    def _part(w, fr: Fragment, warps: list[int]) -> None:
        """Leave only some warps in a fragment; the others become one of their own."""
        keep = np.zeros(w.lanes, bool)
        keep.reshape(-1, 32)[warps] = True
        w.fragments.append(fr.part(fr.pc, fr.mask & ~keep))
        fr.mask = fr.mask & keep


def _blocks(other: Fragment, fr: Fragment) -> bool:
    """Whether a fragment that is not blocked has lanes of the same warps."""
    if other is fr or other.state == WAITING:
        return False
    warps = (f.mask.reshape(-1, 32).any(1) for f in (other, fr))
    return bool((next(warps) & next(warps)).any())


def ahead_of(fragments: list[Fragment], fr: Fragment) -> int:
    """The next pc at which lanes of the same warps are."""
    return min((f.pc for f in fragments if _blocks(f, fr) and f.pc > fr.pc), default=FAR)


def ready_of(fragments: list[Fragment]) -> list[Fragment]:
    """Those that may run: of fragments with lanes of one warp, that with the lowest pc."""
    running = [f for f in fragments if f.state == RUNNING or f.state == WAITING and f.awake()]
    if len(running) < 2:
        return running
    return [
        f for f in running if not any(g.pc < f.pc and _blocks(g, f) for g in running if g is not f)
    ]
