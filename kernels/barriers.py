"""Named barriers, called after their events, and the turn that warpgroups take."""

import enum
from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute

WARPGROUP = 128  # threads


class NamedBarrier(enum.IntEnum):
    """Hardware barriers 1..15 of a CTA (0 is bar.sync 0, __syncthreads)."""

    TURN = 1  # .. 3: consumer warpgroup i may issue its GEMMs
    O_WRITTEN = 4  # .. 6: consumer warpgroup i has written its rows of O to shared memory
    O_LEFT = 7  # .. 9: the O of warpgroup i's last tile has left shared memory
    O_MAY_BE_WRITTEN = 10  # .. 15: no other warpgroup still reads what warpgroup i's O overwrites;
    #                        two per warpgroup, for tiles in turn


@dataclass(frozen=True)
class WarpgroupTurn:
    """Ping-pong: the consumer warpgroups issue their GEMMs one after another.

    While one warpgroup's GEMMs run, the others do softmax (FA3 paper, section 3.1).  Each turn is
    one barrier of two warpgroups: the one that waits and the one that passes the turn on.
    """

    warpgroup: Any  # 0-based consumer index, warp-uniform
    num_warpgroups: int

    def start(self):
        """Warpgroup 0 goes first: the last one passes it the turn."""
        if self.num_warpgroups > 1:
            _give_first_turn(self.warpgroup, self.num_warpgroups)

    def wait(self):
        if self.num_warpgroups > 1:
            cute.arch.barrier(
                barrier_id=NamedBarrier.TURN + self.warpgroup, number_of_threads=2 * WARPGROUP
            )

    def pass_on(self):
        if self.num_warpgroups > 1:
            cute.arch.barrier_arrive(
                barrier_id=NamedBarrier.TURN + (self.warpgroup + 1) % self.num_warpgroups,
                number_of_threads=2 * WARPGROUP,
            )


@cute.jit
def _give_first_turn(warpgroup, num_warpgroups: int):
    if warpgroup == num_warpgroups - 1:
        cute.arch.barrier_arrive(barrier_id=int(NamedBarrier.TURN), number_of_threads=2 * WARPGROUP)
