"""When a side copies what: cp.async by its threads, ahead of what all compute.

The side that makes P copies K, Q and lse, the other one V, dO and delta.

    two stages    | wait, barrier |  S, dP   P, dS   dV, dK     | barrier |  dQ
      in flight                   | Q, dO of the next block ..                |

    one stage     | wait, barrier |  S, dP   P, dS   dV, dK     | barrier |  dQ
      in flight                                                           | Q, dO of the next block
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ...async_copy import copy_chunk
from ..copies import RowCopy, address_in, commit, wait_for_all


@dataclass(frozen=True)
class StatsCopy:
    """A number per query of a block: lse or delta."""

    tile_m: cutlass.Constexpr[int]
    source: Int64  # address of those of the first block of all heads
    first_block: Int32  # of the query head, among those of all heads
    target: Int32  # address of the first stage
    thread: Any

    @staticmethod
    def of(tile_m: int, stats: cute.Pointer, first_block, space: cute.Pointer, thread):
        """stats: tile_m fp32, those of a block 2 tile_m from those of the next."""
        return StatsCopy(tile_m, stats.toint(), first_block, Int32(space.toint()), thread)

    @cute.jit
    def issue(self, m_block, stage):
        if self.thread < self.tile_m // 4:
            offset = 16 * self.thread
            block = self.first_block + m_block
            source = address_in(self.source, block, 8 * self.tile_m, offset)
            copy_chunk(self.target + stage * (4 * self.tile_m) + offset, source, Int32(16))


@dataclass(frozen=True)
class Loads:
    """The copies of one query head, as one thread of a side issues them."""

    num_stages: cutlass.Constexpr[int]
    rows: RowCopy  # of Q or dO
    stats: StatsCopy
    m_min: Any  # the last block

    def stage(self, m_block):
        """Where block m_block goes."""
        return m_block % self.num_stages if self.num_stages > 1 else 0

    def start(self, m_block):
        """Issue what the first step needs; no warp reads its stage any more."""
        self._issue(m_block, is_partial=True)

    @cute.jit
    def before_scores(self, m_block):
        """The block is there, and all have finished the step before."""
        wait_for_all()
        if cutlass.const_expr(self.num_stages > 1):
            self._next(m_block)

    @cute.jit
    def after_sums(self, m_block):
        """All have finished with the block, but for dQ."""
        cute.arch.sync_threads()
        if cutlass.const_expr(self.num_stages == 1):
            self._next(m_block)

    @cute.jit
    def _next(self, m_block):
        if m_block > self.m_min:
            self._issue(m_block - 1, is_partial=False)

    def _issue(self, m_block, is_partial: bool):
        self.rows.issue(m_block, self.stage(m_block), is_partial)
        self.stats.issue(m_block, self.stage(m_block))
        commit()


def numbers_of_thread(space: cute.Pointer, stage, tile_m: int, first, count: int) -> cute.Tensor:
    """(count / 4,) numbers of the columns that a thread has of an accumulator of count columns.

    space: (tile_m, num_stages) fp32; first: the thread's first column, even.
    """
    column = space + stage * tile_m + first
    source = cute.make_tensor(column.align(8), cute.make_layout((2, count // 8), stride=(1, 8)))
    numbers = cute.make_rmem_tensor((2, count // 8), Float32)
    cute.autovec_copy(source, numbers)
    return cute.make_tensor(numbers.iterator, cute.make_layout(count // 4))
