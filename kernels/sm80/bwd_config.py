"""Sm80BwdConfig: how the backward kernel for Ampere and Ada is laid out."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..bwd_signature import BwdSignature
from ..config import check_fields, check_memory
from .config import A100, RESERVED, ROWS, block_columns

SIDE_WARPS = 4
MAX_SUMS = 208  # registers of a thread for accumulators and operands that it keeps


@dataclass(frozen=True)
class Sm80BwdConfig:
    """Tiles of the backward kernel, and how its two sides of four warps each divide them.

    A side's warps split the keys, key_warps to a tile, and what is left of four the queries of a
    block (of S or dP) and the channels (of dV or dK).
    """

    tile_m: int  # queries per step
    tile_n: int  # keys per CTA
    key_warps: int = 4
    num_stages: int = 2  # of Q and dO
    k_in_registers: int = 0  # columns of K that are operands in registers all the time
    v_in_registers: int = 0
    score_slices: int = 1  # in which a warp makes its scores, one after the other: fewer registers
    v_is_kept: bool = True  # False: what is in registers of V came by the space of Q and dO

    @property
    def num_threads(self) -> int:
        return 2 * 32 * SIDE_WARPS

    @property
    def column_warps(self) -> int:
        """Warps of a side that have the same keys."""
        return SIDE_WARPS // self.key_warps

    @property
    def keys_per_warp(self) -> int:
        return self.tile_n // self.key_warps

    @property
    def score_columns(self) -> int:
        """Queries of a block whose scores a warp makes."""
        return self.tile_m // self.column_warps

    @property
    def v_columns_lost(self) -> int:
        """Columns of V that stay in registers only."""
        return 0 if self.v_is_kept else self.v_in_registers

    @property
    def slice_columns(self) -> int:
        """Queries of a slice of a warp's scores."""
        return self.score_columns // self.score_slices

    def split(self, warp) -> tuple:
        """Which part of the keys a side's warp has, and which of queries and channels."""
        return (
            (warp, 0)
            if self.key_warps == SIDE_WARPS
            else (warp % self.key_warps, warp // self.key_warps)
        )

    @property
    def delta_in_parts(self) -> bool:
        return False

    @property
    def dq_counters(self) -> int:
        """Per block of queries, if deterministic."""
        return 1

    def _splits_dq(self, head_dim: int) -> bool:
        try:
            self.dq_warps(head_dim)
        except ValueError:
            return False
        return True

    def dq_warps(self, head_dim: int) -> tuple[int, int]:
        """How all warps split a block of dQ: along queries, and along channels."""
        warps = 2 * SIDE_WARPS
        for rows in (2, 4, 1):
            columns = warps // rows
            if self.tile_m % (ROWS * rows) == 0 and head_dim % (16 * columns) == 0:
                return rows, columns
        raise ValueError(f"tile_m is {self.tile_m}, which 8 warps cannot split with {head_dim}")

    def check(self, signature: BwdSignature, smem_of_sm: int = A100) -> None:
        """Raises ValueError, which names the field and its limits, if no kernel can be so."""
        check_fields(self, self._rules(signature))
        limit = smem_of_sm - RESERVED
        check_memory(self, self.smem_bytes(signature), limit, "tile_m, tile_n or num_stages")

    def fits(self, signature: BwdSignature, smem_of_sm: int) -> bool:
        """Whether check() has nothing to say."""
        try:
            self.check(signature, smem_of_sm)
        except ValueError:
            return False
        return True

    def _rules(self, signature: BwdSignature) -> Iterator[tuple[str, bool, str]]:
        """Name of a field, whether it is right, and what is."""
        d, dv = signature.head_dim, signature.head_dim_v
        yield "key_warps", self.key_warps in (2, 4), "2 or 4"
        yield "num_stages", self.num_stages in (1, 2), "1 or 2"
        yield "tile_m", self.tile_m in (32, 64), "32 or 64"
        yield "tile_m", self._splits_dq(d), f"64: 8 warps cannot split 32 queries of dQ with {d}"
        unit = ROWS * self.key_warps
        keys = range(unit, 129, unit)
        yield "tile_n", self.tile_n in keys, f"a multiple of {unit} from {unit} to 128"
        slices = [n for n in (1, 2) if self.score_columns % (16 * n) == 0]
        yield "score_slices", self.score_slices in slices, f"one of {slices}"
        for name, width, sums in (("k_in_registers", d, dv), ("v_in_registers", dv, d)):
            kept, columns = getattr(self, name), block_columns(width)
            widths = [*range(0, width + 1, columns)] if self.key_warps == SIDE_WARPS else [0]
            yield name, kept in widths, f"one of {widths}"
            count = self.keys_per_warp * (sums // self.column_warps + self.slice_columns) // 32
            count += self.keys_per_warp * kept // 64
            yield "tile_n", count <= MAX_SUMS, f"less: it takes {count} registers, of {MAX_SUMS}"
        fits = self.v_is_kept or self.tile_n * self.v_in_registers <= self._rows(signature)
        yield "v_is_kept", fits, "True, as there is more of V than of Q and dO"

    def _rows(self, signature: BwdSignature) -> int:
        """Elements of Q and dO."""
        return self.num_stages * self.tile_m * (signature.head_dim + signature.head_dim_v)

    def smem_bytes(self, signature: BwdSignature) -> int:
        """Dynamic shared memory of a CTA."""
        d, dv = signature.head_dim, signature.head_dim_v
        keys = self.tile_n * (d + dv - self.v_columns_lost)
        p_and_ds = self.column_warps * self.tile_m * self.tile_n
        stats = 2 * self.num_stages * self.tile_m * 2  # lse and delta, fp32
        return 2 * (keys + self._rows(signature) + p_and_ds + stats)
