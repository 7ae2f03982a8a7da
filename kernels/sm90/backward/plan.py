"""BwdPlan: the compile-time numbers that the roles of the backward kernel share."""

from dataclasses import dataclass

import cutlass.cute as cute

from ...barriers import WARPGROUP
from ...bwd_config import BwdConfig
from ...bwd_signature import BwdSignature
from ...elements import ELEMENT
from ...lengths import EqualLengths, RaggedLengths
from ...tiling import KeyTiles


@dataclass(frozen=True)
class BwdBarriers:
    """Hardware barriers of the consumers of a CTA, by event; 0 is __syncthreads."""

    num_threads: int

    def ds_written(self):
        """Their parts of dS are in shared memory."""
        self._wait(1)

    def products_done(self):
        """They have finished the last products of a tile."""
        self._wait(2)

    def gradients_written(self):
        """Their parts of dK and dV are in shared memory."""
        self._wait(3)

    def wait_for_ds(self, warpgroup, buffer):
        """The other one's dS of the step before is written, and it has done with this buffer."""
        cute.arch.barrier(barrier_id=6 + 2 * buffer + warpgroup, number_of_threads=2 * WARPGROUP)

    def hand_on_ds(self, warpgroup, buffer):
        """To the other one, what it waits for ahead of its dS of the next step, in `buffer`."""
        number = 6 + 2 * buffer + (1 - warpgroup)
        cute.arch.barrier_arrive(barrier_id=number, number_of_threads=2 * WARPGROUP)

    def p_written(self):
        """P is in shared memory, where warpgroups split the products."""
        self._wait(6)

    def dq_in_order(self, warpgroup):
        """A warpgroup is about to add its dQ, or has."""
        cute.arch.barrier(barrier_id=4 + warpgroup, number_of_threads=WARPGROUP)

    def _wait(self, number: int):
        cute.arch.barrier(barrier_id=number, number_of_threads=self.num_threads)


@dataclass(frozen=True)
class BwdPlan:
    """The compile-time numbers that the roles share."""

    signature: BwdSignature
    config: BwdConfig

    @property
    def tiling(self) -> KeyTiles:
        signature, config = self.signature, self.config
        in_order = signature.deterministic
        return KeyTiles(signature.mask, config.tile_m, config.tile_n, in_order)

    @property
    def lengths(self) -> EqualLengths | RaggedLengths:
        return (RaggedLengths if self.signature.is_ragged else EqualLengths)(self)

    @property
    def element(self):
        return ELEMENT[self.signature.dtype]

    @property
    def num_consumers(self) -> int:
        """Threads."""
        return WARPGROUP * self.config.num_mma_warpgroups

    @property
    def barriers(self) -> BwdBarriers:
        return BwdBarriers(self.num_consumers)

    @property
    def q_tile(self):
        return (self.config.tile_m, self.signature.head_dim)

    @property
    def do_tile(self):
        return (self.config.tile_m, self.signature.head_dim_v)

    @property
    def k_tile(self):
        return (self.config.tile_n, self.signature.head_dim)

    @property
    def v_tile(self):
        return (self.config.tile_n, self.signature.head_dim_v)
