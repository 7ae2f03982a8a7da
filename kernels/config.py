"""FwdConfig: how the forward kernel is laid out, the part of a kernel that tuning may change."""

from dataclasses import dataclass
from typing import Literal

from .signature import Signature

SMEM_LIMIT = 232_448  # bytes of dynamic shared memory per CTA on sm_90 (227 KiB)
BARRIER_BYTES = 1024  # mbarriers and alignment

# own: a buffer of its own: the next tile's loads and the epilogue do not meet.
# k:   the slot of the tile's last K block, released once O has left; Q and the other slots refill.
# q:   the space of Q: the next Q waits until O has left.
OSpace = Literal["own", "k", "q"]


@dataclass(frozen=True)
class FwdConfig:
    """Tiles and pipeline depth of the forward kernel.

    A CTA holds one producer warpgroup and `num_mma_warpgroups` consumers of 64 query rows each.
    """

    tile_n: int  # key rows per step
    num_mma_warpgroups: int = 2
    num_stages: int = 2  # depth of the K ring and of the V ring

    @property
    def tile_m(self) -> int:
        """Query rows per CTA."""
        return 64 * self.num_mma_warpgroups

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.num_mma_warpgroups)

    @property
    def producer_registers(self) -> int:
        return {1: 56, 2: 24, 3: 32}[self.num_mma_warpgroups]

    @property
    def consumer_registers(self) -> int:
        return {1: 256, 2: 240, 3: 160}[self.num_mma_warpgroups]

    def o_space(self, signature: Signature) -> OSpace:
        """Where O waits for its TMA store: the first of the three that shared memory allows."""
        if self._smem_bytes(signature, with_o=True) <= SMEM_LIMIT:
            return "own"
        # Two stages: then no warpgroup can be two tiles ahead of one that still writes O to a slot.
        fits = signature.head_dim_v * self.tile_m <= self._k_stage(signature)
        return "k" if fits and self.num_stages == 2 else "q"

    def smem_bytes(self, signature: Signature) -> int:
        """Shared memory of a CTA."""
        return self._smem_bytes(signature, with_o=self.o_space(signature) == "own")

    def _k_stage(self, signature: Signature) -> int:
        return self.tile_n * signature.head_dim  # elements

    def _smem_bytes(self, signature: Signature, with_o: bool) -> int:
        q, o = self.tile_m * signature.head_dim, self.tile_m * signature.head_dim_v
        v_stage = self.tile_n * signature.head_dim_v
        kv = self.num_stages * (self._k_stage(signature) + v_stage)
        return 2 * (kv + (q + o if with_o else max(q, o))) + BARRIER_BYTES
