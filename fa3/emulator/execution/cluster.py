"""The CTAs of one cluster, run cooperatively: each warpgroup until all of it is blocked."""

from __future__ import annotations

from collections import deque

from ..checks import ProxyClock
from ..errors import Deadlock, EmulatorError, KernelError, Runaway
from . import report
from .cta import CTA
from .fragments import RUNNING, WAITING

# rounds of timed-out waits without progress after which the cluster counts as dead
STALE_ROUNDS = 50


class Cluster:
    def __init__(self, launch, positions: list[tuple[int, int, int]]):
        self.launch = launch
        self.proxy = ProxyClock()
        self.events = 0  # counts whatever may wake a waiting fragment
        self.arrived = self.generation = 0  # of the cluster barrier
        self._in_transit: deque = deque()  # loads that late mode has not delivered yet
        gx, gy, _ = launch.grid
        self.ctas: list[CTA] = []
        for rank, (x, y, z) in enumerate(positions):
            self.ctas.append(CTA(self, rank, (x, y, z), x + gx * (y + gy * z)))

    @property
    def warpgroups(self):
        return [w for cta in self.ctas for w in cta.warpgroups]

    def peer(self, number: int):
        """Shared memory of the CTA of rank number - 1."""
        if not 1 <= number <= len(self.ctas):
            raise KernelError(
                f"shared::cluster access to CTA {number - 1} of a cluster of {len(self.ctas)}"
            )
        return self.ctas[number - 1].smem

    def asynchronously(self, w, site: int, copy) -> None:
        """Deliver a bulk load: at once, or in late mode when nothing else can run."""
        if self.launch.checks.late:
            self._in_transit.append((w, w.deferred(site, copy)))
        else:
            copy()

    def settle(self) -> None:
        """Complete the cluster barrier if every live thread has arrived."""
        if self.arrived and self.arrived >= sum(cta.live for cta in self.ctas):
            self.generation += 1
            self.arrived = 0
            self.events += 1

    def run(self) -> None:
        running = self.warpgroups
        stale, seen = 0, -1
        while True:
            ran = any([self._step(w) for w in running])
            running = [w for w in running if w.fragments]
            if not running:
                break
            self._check_limit()
            if ran and self.events != seen:
                seen, stale = self.events, 0
            elif self._in_transit:
                self._land()
                stale = 0
            else:
                stale += 1
                if stale > STALE_ROUNDS and not self._computing(running):
                    raise Deadlock(report.deadlock(running))
                seen = self.events
                self._time_out(running)
        while self._in_transit:
            self._land()

    def _step(self, w) -> bool:
        try:
            return w.run()
        except (EmulatorError, IndexError) as error:
            raise report.located(error, w) from error

    def _land(self) -> None:
        w, copy = self._in_transit.popleft()
        try:
            copy()
        except EmulatorError as error:
            raise report.located(error, w) from error

    def _check_limit(self) -> None:
        done = sum(w.instructions for w in self.warpgroups)
        if done > self.launch.instruction_limit:
            raise Runaway(
                f"more than {self.launch.instruction_limit} instructions in one "
                "cluster: an endless loop?"
            )

    @staticmethod
    def _computing(running) -> bool:
        """Whether something is not blocked, only long."""
        return any(f.state == RUNNING for w in running for f in w.fragments)

    @staticmethod
    def _time_out(running) -> None:
        """Let every mbarrier wait return false, as try_wait may."""
        for w in running:
            for f in w.fragments:
                if f.state == WAITING:
                    f.timed_out = True
