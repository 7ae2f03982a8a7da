"""Named barriers, called after their events, and the turn that warpgroups take."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute

WARPGROUP = 128  # threads
LAST_BARRIER = 15


@dataclass(frozen=True)
class NamedBarriers:
    """Numbers of the hardware barriers of a CTA, by event; 0 is __syncthreads, 15 the last one.

    There is one of each kind for every consumer warpgroup.
    """

    num_warpgroups: int

    def __post_init__(self):
        last = 5 * self.num_warpgroups
        if last > LAST_BARRIER:
            raise ValueError(
                f"{self.num_warpgroups} warpgroups need {last} named barriers, expected at most "
                f"{LAST_BARRIER}"
            )

    def turn(self, warpgroup):
        """It may issue its GEMMs."""
        return self._of(0, warpgroup)

    def o_written(self, warpgroup):
        """It has written its rows of O to shared memory."""
        return self._of(1, warpgroup)

    def o_left(self, warpgroup):
        """The O of its last tile has left shared memory."""
        return self._of(2, warpgroup)

    def o_may_be_written(self, warpgroup, turn):
        """No other warpgroup still reads what its O overwrites; two, for tiles in turn."""
        return self._of(3 + turn % 2, warpgroup)

    def _of(self, kind, warpgroup):
        return 1 + self.num_warpgroups * kind + warpgroup


@dataclass(frozen=True)
class WarpgroupTurn:
    """Ping-pong: the consumer warpgroups issue their GEMMs one after another.

    While one warpgroup's GEMMs run, the others do softmax (FA3 paper, section 3.1).  Each turn is
    one barrier of two warpgroups: the one that waits and the one that passes the turn on.
    """

    warpgroup: Any  # 0-based consumer index, warp-uniform
    num_warpgroups: int

    @property
    def barriers(self) -> NamedBarriers:
        return NamedBarriers(self.num_warpgroups)

    def start(self):
        """Warpgroup 0 goes first: the last one passes it the turn."""
        if self.num_warpgroups > 1:
            self._give_first_turn()

    def wait(self):
        if self.num_warpgroups > 1:
            cute.arch.barrier(
                barrier_id=self.barriers.turn(self.warpgroup), number_of_threads=2 * WARPGROUP
            )

    def pass_on(self):
        if self.num_warpgroups > 1:
            self._arrive((self.warpgroup + 1) % self.num_warpgroups)

    def _arrive(self, warpgroup):
        cute.arch.barrier_arrive(
            barrier_id=self.barriers.turn(warpgroup), number_of_threads=2 * WARPGROUP
        )

    @cute.jit
    def _give_first_turn(self):
        if self.warpgroup == self.num_warpgroups - 1:
            self._arrive(0)
