"""BwdConfig: how the backward kernel is laid out, the part of it that tuning may change."""

from collections.abc import Iterator
from dataclasses import dataclass

from .bwd_signature import BwdSignature
from .config import BARRIER_BYTES, SMEM_LIMIT, check_fields, check_memory

DELTA_DEPTH = 16  # k of one wgmma: parts of delta, and zeros
ACCUMULATORS = 208  # registers of a consumer thread for accumulators and operands


@dataclass(frozen=True)
class BwdConfig:
    """Tiles and pipeline depth of the backward kernel.

    A CTA holds one producer warpgroup and `num_mma_warpgroups` consumers.  Either each of them has
    64 keys, all channels of their dK and dV, and P and dS in registers.  Or, where dK and dV need
    more registers than a thread has, all have the same keys: an equal part of their channels of
    both (64 keys), or one of them P and dV, the other one dS and dK (splits_products).
    """

    tile_m: int  # queries per step
    tile_n: int = 128  # keys per CTA
    num_mma_warpgroups: int = 2
    dv_early: bool = False  # dV += P^T dO ahead of the arithmetic of dS; needs registers, P in them
    v_in_registers: bool = False  # dP^T = V dO^T reads V from there; a warpgroup has its own keys
    delta_in_parts: bool = False  # the product that makes dP subtracts delta, in three 16-bit parts
    num_stages: int = 2  # of the rings of Q and dO; of shared channels buffers of dS and P, too
    dq_in_bulk: bool = False  # dQ is added to its sums from shared memory, else from registers
    splits_products: bool = False  # a warpgroup makes P and dV, the other one dS and dK
    do_stages: int = 0  # of the ring of dO; 0: num_stages
    dq_slices: int = 1  # dQ is made in so many parts of its columns, one after another
    dq_copies: int = 1  # in which a warp's dQ of a step leaves in bulk, as many of each slice
    dq_room: int = 1  # for how many of them there is shared memory

    @property
    def splits_keys(self) -> bool:
        """Each warpgroup has keys of its own."""
        return not self.splits_products and self.tile_n == 64 * self.num_mma_warpgroups

    @property
    def stages_of_do(self) -> int:
        return self.do_stages or self.num_stages

    @property
    def ds_buffers(self) -> int:
        """Of dS, and of P where it has some."""
        if self.splits_products:
            return 1
        return 2 if self.splits_keys else self.num_stages

    def channels(self, head_dim: int) -> int:
        """Columns of dK or dV that a warpgroup has."""
        whole = self.splits_keys or self.splits_products
        return head_dim if whole else head_dim // self.num_mma_warpgroups

    def dq_channels(self, head_dim: int) -> int:
        """Columns of dQ that a warpgroup makes at once."""
        part = head_dim if self.dq_is_split_by_rows else head_dim // self.num_mma_warpgroups
        return part // self.dq_slices

    @property
    def score_columns(self) -> int:
        """Queries of a block whose scores a warpgroup makes: S and dP, or one of them."""
        whole = self.splits_keys or self.splits_products
        return self.tile_m if whole else self.tile_m // self.num_mma_warpgroups

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.num_mma_warpgroups)

    @property
    def producer_registers(self) -> int:
        return 24

    @property
    def consumer_registers(self) -> int:
        return 240

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
        yield "num_mma_warpgroups", warpgroups == 2, "2"
        yield "tile_m", self.tile_m in (64, 64 * warpgroups), f"64 or {64 * warpgroups}"
        if self.splits_products:
            yield "tile_m", self.tile_m == 64, "64 with splits_products"
            yield (
                "tile_n",
                self.tile_n in (64, 80, 96, 128),
                "64, 80, 96 or 128 with splits_products",
            )
            can = warpgroups == 2 and d % 64 == dv % 64 == 0 and signature.score is None
            expected = "True for 2 warpgroups, head dims of 64s and no softcap alone"
            yield "splits_products", can, expected
        else:
            yield "tile_n", self.tile_n in (64, 64 * warpgroups), f"64 or {64 * warpgroups}"
            enough = "at least 2, or loads would wait for the step before"
            yield "num_stages", self.num_stages >= 2, enough
            expected = "that of num_stages without splits_products, as dO is released with Q"
            yield "do_stages", self.stages_of_do == self.num_stages, expected
        for count in self._accumulators(d, dv):
            expected = f"less: accumulators are {count} registers, of {ACCUMULATORS}"
            yield "tile_m", count <= ACCUMULATORS, expected
        yield "dv_early", self.splits_keys or not self.dv_early, "False where P has no registers"
        for name in ("v_in_registers", "delta_in_parts"):
            own = self.splits_keys or not getattr(self, name)
            yield name, own, "False where warpgroups share the keys"
        whole = self.dq_channels(d) % 16 == 0 and self.dq_slices > 0
        yield "dq_slices", whole, "parts of 16 columns of dQ"
        yield "dq_copies", self.dq_copies % self.dq_slices == 0, "a multiple of dq_slices"
        yield "dq_room", 1 <= self.dq_room <= self.dq_copies, "from 1 to dq_copies"

    def _accumulators(self, d: int, dv: int) -> Iterator[int]:
        """Registers of a consumer thread while it makes scores, and while it makes dQ."""
        dq = self.tile_m * d // (128 * self.num_mma_warpgroups * self.dq_slices)
        if self.splits_products:
            sums, scores = self.tile_n * max(d, dv) // 128, self.tile_m * self.tile_n // 128
        else:
            sums, scores = (self.channels(d) + self.channels(dv)) // 2, self.score_columns
        yield sums + scores
        yield sums + dq

    def smem_bytes(self, signature: BwdSignature) -> int:
        """Shared memory of a CTA."""
        d_and_dv = signature.head_dim + signature.head_dim_v
        keys = self.tile_n * d_and_dv
        q = self.num_stages * self.tile_m * (signature.head_dim + 2)  # with lse in fp32
        do = self.stages_of_do * self.tile_m * (signature.head_dim_v + 2)  # with delta
        ds = self.tile_m * self.tile_n * (1 if self.splits_keys else 2)  # and P
        dq = 2 * self.tile_m * signature.head_dim * self.dq_room // self.dq_copies
        dq *= self.dq_in_bulk and signature.with_dq
        delta = 0
        if self.delta_in_parts:  # in place of fp32, and what it is multiplied by
            delta = self.stages_of_do * self.tile_m * (DELTA_DEPTH - 2) + 64 * DELTA_DEPTH
        return 2 * (keys + q + do + self.ds_buffers * ds + dq + delta) + BARRIER_BYTES
