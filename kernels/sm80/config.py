"""Sm80Config: how a kernel for Ampere and Ada is laid out, the part that tuning may change."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import check_fields, check_memory
from ..ctas import MAX_CTAS
from ..signature import Signature

# Shared memory by compute capability: of an SM, and what a CTA may have of it.  The driver keeps
# 1 KiB of each CTA's.
RESERVED = 1024
SMEM_OF_SM = {
    **{(8, 0): 164 << 10, (8, 6): 100 << 10, (8, 7): 164 << 10, (8, 9): 100 << 10},
    **{(10, 0): 228 << 10, (10, 3): 228 << 10, (11, 0): 228 << 10},
    **{(12, 0): 100 << 10, (12, 1): 100 << 10},
}
A100 = SMEM_OF_SM[8, 0]
REGISTERS_OF_SM = 65_536
MAX_REGISTERS = 255  # of a thread
ROWS = 16  # of a fragment
MAX_SMS = 192  # no GPU that runs these kernels has more than 188


def block_columns(width: int) -> int:
    """Of a column block of a tile of 16-bit elements (copies.py)."""
    return 64 if width % 64 == 0 else 32


@dataclass(frozen=True)
class Sm80Config:
    """Tiles and pipeline depth; all warps of a CTA do the same, each for query rows of its own."""

    tile_n: int  # key rows per step
    num_warps: int = 4
    rows_per_warp: int = 32  # query rows; K and V are read from shared memory once for all of them
    num_stages: int = 1  # of K and of V
    ctas_per_sm: int = 2
    q_in_registers: int = 0  # columns of Q that are operands in registers all the time, at most
    warps_per_row: int = 1  # 2: pairs of warps share their rows (forward/pair.py)

    @property
    def tile_m(self) -> int:
        """Query rows per CTA."""
        return self.num_warps * self.rows_per_warp // self.warps_per_row

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def max_ctas(self) -> int:
        """On any GPU, as far as a list of tiles has room for them."""
        return min(self.ctas_per_sm * MAX_SMS, MAX_CTAS)

    def is_dynamic(self, signature: Signature) -> bool:
        """As that of FwdConfig: its tiles are dealt ahead."""
        return False

    def check(self, signature: Signature, smem_of_sm: int = A100) -> None:
        """Raises ValueError, which names the field and its limits, if no kernel can be so."""
        check_fields(self, self._rules(signature))
        smaller = "tile_n, num_stages, num_warps or ctas_per_sm"
        check_memory(self, self.smem_bytes(signature), self.smem_limit(smem_of_sm), smaller)

    def smem_limit(self, smem_of_sm: int) -> int:
        """Bytes of dynamic shared memory that a CTA may have."""
        return smem_of_sm // self.ctas_per_sm - RESERVED

    def fits(self, signature: Signature, smem_of_sm: int) -> bool:
        """Whether check() has nothing to say."""
        try:
            self.check(signature, smem_of_sm)
        except ValueError:
            return False
        return True

    def _rules(self, signature: Signature) -> Iterator[tuple[str, bool, str]]:
        """Name of a field, whether it is right, and what is."""
        yield "num_warps", self.num_warps in (4, 8), "4 or 8"
        yield "rows_per_warp", self.rows_per_warp in (16, 32), "16 or 32"
        unit = self._rows_per_copy(signature)
        keys = range(unit, 257, unit)
        yield "tile_n", self.tile_n in keys, f"a multiple of {unit} from {unit} to 256"
        yield "num_stages", self.num_stages in (1, 2), "1 or 2"
        yield "warps_per_row", self.warps_per_row in (1, 2), "1 or 2"
        part = ROWS * self.warps_per_row
        yield "tile_n", self.tile_n % part == 0, f"a multiple of {part}"
        threads = self.num_threads * self.ctas_per_sm
        widths = range(0, 257, 16)
        yield "q_in_registers", self.q_in_registers in widths, "a multiple of 16 from 0 to 256"
        yield "ctas_per_sm", 1 <= self.ctas_per_sm and threads <= 1024, "1 to 1024 / threads"

    def _rows_per_copy(self, signature: Signature) -> int:
        """Rows that all threads copy at once (copies.RowCopy)."""
        is_narrow = any(width % 64 for width in (signature.head_dim, signature.head_dim_v))
        return self.num_threads // (4 if is_narrow else 8)

    def smem_bytes(self, signature: Signature) -> int:
        """Dynamic shared memory of a CTA.  O takes the place of Q."""
        d, dv = signature.head_dim, signature.head_dim_v
        stages = self.num_stages * self.tile_n * (d + dv)
        return 2 * (self.tile_m * max(d, dv) + stages) + self.pair_bytes

    @property
    def pair_bytes(self) -> int:
        """For what pairs of warps exchange: P, and a word per thread."""
        if self.warps_per_row == 1:
            return 0
        return 2 * self.tile_m * self.tile_n + 4 * self.num_threads
