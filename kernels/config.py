"""FwdConfig: how the forward kernel is laid out, the part of a kernel that tuning may change."""

from dataclasses import dataclass

from .signature import Signature

SMEM_LIMIT = 232_448  # bytes of dynamic shared memory per CTA on sm_90 (227 KiB)
BARRIER_BYTES = 1024  # mbarriers and alignment


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

    def smem_bytes(self, signature: Signature) -> int:
        """Shared memory of a CTA; O shares the space of Q."""
        q = self.tile_m * max(signature.head_dim, signature.head_dim_v)
        kv = self.tile_n * self.num_stages * (signature.head_dim + signature.head_dim_v)
        return 2 * (q + kv) + BARRIER_BYTES
