"""The CTAs of one cluster, run cooperatively: each warpgroup until all of it is blocked."""

from __future__ import annotations

from functools import partial

from ..checks import ProxyClock
from ..cluster_races import ClusterRaces
from ..errors import EmulatorError, KernelError
from ..memory import mbarrier
from ..memory.operations import Operation
from ..races import Races
from . import report
from .cta import CTA
from .fragments import RUNNING, WAITING
from .in_time import run_in_time
from .interleaving import Interleaving

# rounds of timed-out waits without progress after which the cluster counts as dead
STALE_ROUNDS = 50


class Cluster:
    def __init__(self, launch, positions: list[tuple[int, int, int]], number: int):
        """positions of its CTAs in the grid; number counts the clusters of the launch."""
        self.launch, self.number = launch, number
        self.proxy = ProxyClock(launch.lowered)
        self.races = Races(self) if launch.checks.race else None
        across = launch.checks.across and self.races is not None
        self.global_races = ClusterRaces(self.races) if across else None
        self.clock = self.arriving = None  # what the cluster barrier passes on (check "race")
        self.profile = launch.profile and launch.profile.observer(len(positions))
        self.events = 0  # counts whatever may wake a waiting fragment
        self._stale, self._seen = 0, -1  # rounds in which nothing moved, events at the last
        self.arrived = self.generation = 0  # of the cluster barrier
        self.in_flight: list[Operation] = []  # late: loads; random: whatever may complete now
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
        cta = self.ctas[number - 1]
        if not cta.live:
            raise KernelError(
                f"shared::cluster access to CTA {number - 1} of the cluster, all threads of which "
                "have exited: its shared memory may be another's"
            )
        return cta.smem

    def counts(self) -> dict[str, int]:
        """What it adds to the statistics of its launch."""
        return {
            "instructions": sum(w.instructions for w in self.warpgroups),
            "segments": sum(w.segments for w in self.warpgroups),
        }

    def issue(self, operation: Operation, waited_for: bool) -> None:
        """Complete an operation now or, as the schedule says, later.

        waited_for: its own thread waits for its group; in late mode the wait completes it.
        """
        kind = self.launch.schedule.kind
        if kind == "eager":
            operation.complete()
        elif kind == "random" or not waited_for:
            self.in_flight.append(operation)

    def settle(self) -> None:
        """Complete the cluster barrier if every live thread has arrived."""
        if self.arrived and self.arrived >= sum(cta.live for cta in self.ctas):
            self.generation += 1
            self.clock, self.arriving = self.arriving, None
            self.arrived = 0
            self.events += 1

    def run(self) -> None:
        if self.launch.schedule.kind == "random":
            Interleaving(self).run()
        elif self.profile is not None:
            run_in_time(self)
        else:
            self._run_in_order()
        while self.in_flight:
            self.land(0)
        if self.launch.checks.mbarrier:
            for cta in self.ctas:
                self.step(cta.warpgroups[0], partial(mbarrier.require_settled, cta.smem))

    def _run_in_order(self) -> None:
        running = self.warpgroups
        while True:
            ran = any([self.step(w, w.run) for w in running])
            running = [w for w in running if w.fragments]
            if not running:
                break
            self.check_limit()
            if ran and self.events != self._seen:
                self._seen, self._stale = self.events, 0
            elif self.in_flight:
                self.land(0)
                self._stale = 0
            else:
                self.stall(running)

    def stall(self, running) -> None:
        """Nothing can move: let waits give up, and call a cluster dead if that has not helped."""
        self._stale = self._stale + 1 if self.events == self._seen else 0
        if self._stale > STALE_ROUNDS and not self._computing(running):
            raise report.deadlock(self.warpgroups)
        self._seen = self.events
        self.time_out(running)

    def step(self, w, run) -> bool:
        """run() on behalf of a warpgroup: errors get their place in the kernel."""
        try:
            return run()
        except (EmulatorError, IndexError) as error:
            raise report.located(error, w) from error

    def land(self, i: int) -> None:
        """Complete the i-th operation in flight, or the one that has to precede it."""
        operation = self.in_flight[i].next()
        self.in_flight.remove(operation)
        self.step(operation.w, operation.complete)

    def check_limit(self) -> None:
        done = sum(w.instructions for w in self.warpgroups)
        if done > self.launch.instruction_limit:
            raise report.runaway(self.warpgroups, self.launch.instruction_limit)

    @staticmethod
    def _computing(running) -> bool:
        """Whether something is not blocked, only long."""
        return any(f.state == RUNNING for w in running for f in w.fragments)

    @staticmethod
    def time_out(running) -> None:
        """Let every mbarrier wait return false, as try_wait may."""
        for w in running:
            for f in w.fragments:
                if f.state == WAITING:
                    f.timed_out = True
