"""BwdConfig: how the backward kernel is laid out, the part of it that tuning may change."""

from collections.abc import Iterator
from dataclasses import dataclass

from .bwd_signature import BwdSignature
from .config import BARRIER_BYTES, SMEM_LIMIT, check_fields, check_memory

ACCUMULATORS = 208  # registers of a consumer thread for accumulators and operands


@dataclass(frozen=True)
class BwdConfig:
    """Tiles and pipeline depth of the backward kernel.

    A CTA holds one producer warpgroup and `num_mma_warpgroups` consumers.  Either each of them has
    64 keys, all channels of their dK and dV, and P and dS in registers; or all have the same 64
    keys and an equal part of the channels, where dK and dV need more registers than a thread has.
    """

    tile_m: int  # queries per step
    tile_n: int = 128  # keys per CTA
    num_mma_warpgroups: int = 2
    dv_early: bool = False  # dV += P^T dO ahead of the arithmetic of dS; needs registers, P in them
    num_stages: int = 2  # of the rings of Q and dO; buffers of dS, and of P where it has some
    dq_in_bulk: bool = False  # dQ is added to its sums from shared memory, else from registers

    @property
    def splits_keys(self) -> bool:
        """Each warpgroup has keys of its own, else channels of its own."""
        return self.tile_n == 64 * self.num_mma_warpgroups

    def channels(self, head_dim: int) -> int:
        """Columns of dK or dV that a warpgroup has."""
        return head_dim if self.splits_keys else head_dim // self.num_mma_warpgroups

    def dq_channels(self, head_dim: int) -> int:
        """Columns of dQ that a warpgroup makes."""
        return head_dim if self.dq_is_split_by_rows else head_dim // self.num_mma_warpgroups

    @property
    def score_columns(self) -> int:
        """Queries of a block whose scores a warpgroup makes."""
        return self.tile_m if self.splits_keys else self.tile_m // self.num_mma_warpgroups

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.num_mma_warpgroups)

    @property
    def producer_registers(self) -> int:
        return {1: 56, 2: 24}[self.num_mma_warpgroups]

    @property
    def consumer_registers(self) -> int:
        return {1: 256, 2: 240}[self.num_mma_warpgroups]

    @property
    def dq_counters(self) -> int:
        """Per block of queries, if deterministic."""
        return self.num_mma_warpgroups

    @property
    def dq_is_split_by_rows(self) -> bool:
        """A warpgroup makes 64 rows of dQ, else an equal part of its columns."""
        return self.tile_m == 64 * self.num_mma_warpgroups

    def check(self, signature: BwdSignature) -> None:
        """Raises ValueError, which names the field and its limits, if no kernel can be so."""
        check_fields(self, self._rules(signature))
        smaller = "tile_m, tile_n or num_stages"
        check_memory(self, self.smem_bytes(signature), SMEM_LIMIT, smaller)

    def _rules(self, signature: BwdSignature) -> Iterator[tuple[str, bool, str]]:
        """Name of a field, whether it is right, and what is."""
        warpgroups, d, dv = self.num_mma_warpgroups, signature.head_dim, signature.head_dim_v
        yield "num_mma_warpgroups", warpgroups in (1, 2), "1 or 2"
        yield "tile_m", self.tile_m in (64, 64 * warpgroups), f"64 or {64 * warpgroups}"
        yield "tile_n", self.tile_n in (64, 64 * warpgroups), f"64 or {64 * warpgroups}"
        sums = (self.channels(d) + self.channels(dv)) // 2
        for step in (self.score_columns, self.tile_m * d // (128 * warpgroups)):  # S, dP; dQ
            count = sums + step
            expected = f"less: accumulators are {count} registers, of {ACCUMULATORS}"
            yield "tile_m", count <= ACCUMULATORS, expected
        yield "dv_early", self.splits_keys or not self.dv_early, "False where tile_n is 64"
        yield "num_stages", self.num_stages >= 2, "at least 2, as one barrier guards a step"

    def smem_bytes(self, signature: BwdSignature) -> int:
        """Shared memory of a CTA."""
        d_and_dv = signature.head_dim + signature.head_dim_v
        keys = self.tile_n * d_and_dv
        stage = self.tile_m * (d_and_dv + 4)  # with lse and delta in fp32
        ds = self.tile_m * self.tile_n * (1 if self.splits_keys else 2)  # and P
        dq = 2 * self.tile_m * signature.head_dim if self.dq_in_bulk and signature.with_dq else 0
        return 2 * (keys + self.num_stages * (stage + ds) + dq) + BARRIER_BYTES
