"""Where K and V come from: blocks and parts of blocks by TMA, or rows that warps gather.

TMA brings pages whose rows fill whole atoms of the swizzle, 8 rows.  Rows of other pages are
gathered: each may lie anywhere, and warps copy it by cp.async to where TMA would have put it.

    lanes      one looks up one row's place; then they copy 8 rows at a time, of each 4 chunks of 16
               bytes: 8 lanes write one chunk of 8 rows, which the swizzle spreads over all banks
    arrivals   cp.async writes as threads do, and wgmma reads through the async proxy: a warp waits
               for its copies and fences before it arrives.  It does so when the copies of the next
               stage are on their way, so that memory never has nothing to do.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from ..async_copy import copy_chunk
from ..sequence import PagedSpan
from ..tensors import RowsOperand
from .rings import Ring
from .rows import CHUNK, COLUMNS, ROWS, RowLayout

GROUPS = 32 // ROWS  # of rows that the lanes of a warp look up at once
NOTHING = 0  # no barrier's address


@dataclass(frozen=True)
class ByTma:
    """The producer warp asks TMA, which arrives by itself."""

    def filler(self, ring: Ring, operand, tile_shape, span, head, row_mode: int):
        return ring.filler(operand, tile_shape, span, head, row_mode)

    def finish(self):
        pass


@dataclass(frozen=True)
class Gather:
    """A warp's part: of every stage each `num_warps`-th group of 8 rows."""

    num_warps: cutlass.Constexpr[int]
    warp: Any
    lane: Any
    pending: cute.Tensor  # (1,) Int32: the full barrier of the stage copied last

    @staticmethod
    def of(num_warps: int, warp) -> "Gather":
        pending = cute.make_rmem_tensor(1, Int32)
        pending[0] = Int32(NOTHING)
        return Gather(num_warps, warp, cute.arch.lane_idx(), pending)

    def filler(  # noqa: PLR0913
        self, ring: Ring, operand: RowsOperand, tile_shape, span: PagedSpan, head, row_mode: int
    ):
        """fill(block, handle): as Ring.filler, but that the stage is full a while later."""
        rows, columns = tile_shape[row_mode], tile_shape[1 - row_mode]
        element = operand.tensor.element_type.width // 8
        layout = RowLayout(rows, columns * element)
        row, chunk = self.lane % ROWS, self.lane // ROWS
        bytes_left = operand.tensor.shape[1] * element - chunk * CHUNK
        stages = Int32(ring.buffer.iterator.toint()) + self.warp * (ROWS * layout.span)
        first_target = stages + layout.first(row, chunk)
        groups, at_once = rows // ROWS, self.num_warps * GROUPS
        is_even = groups % at_once == 0

        @cute.jit
        def fill(block, handle):
            target = first_target + handle.index * layout.bytes
            for first in cutlass.range(0, groups, at_once, unroll=1):
                own = first + self.num_warps * chunk + self.warp  # the group looked up
                address = Int64(0)
                if is_even or own < groups:
                    key = block * rows + ROWS * own + row
                    address = span.address_of(operand.tensor, head, key)
                for i in cutlass.range_constexpr(GROUPS):
                    group = first + self.num_warps * i
                    source = _of_lane(address, ROWS * i + row)
                    if is_even or self.warp + group < groups:
                        place = layout.later(target, ROWS * group, 0)
                        self._copy(layout, place, source, bytes_left)
            cute.arch.cp_async_commit_group()
            self._arrive(1)
            self.pending[0] = Int32(handle.barrier.toint())

        return fill

    def finish(self):
        """Before the warp ends."""
        self._arrive(0)

    @cute.jit
    def _copy(self, layout: cutlass.Constexpr[RowLayout], target, source, bytes_left):
        """This lane's chunks of a row of 8; source: the row's address, or 0 for zeros."""
        left = bytes_left
        if source == 0:
            left = Int32(0)
        source += self.lane // ROWS * CHUNK
        for chunk in cutlass.range_constexpr(0, layout.width // CHUNK, COLUMNS):
            size = cutlass.select_(left > chunk * CHUNK, Int32(CHUNK), Int32(0))
            if cutlass.const_expr(chunk + COLUMNS <= layout.width // CHUNK):
                copy_chunk(layout.later(target, 0, chunk), source + chunk * CHUNK, size)
            elif self.lane // ROWS + chunk < layout.width // CHUNK:
                copy_chunk(layout.later(target, 0, chunk), source + chunk * CHUNK, size)

    @cute.jit
    def _arrive(self, later: cutlass.Constexpr[int]):
        """For the stage copied last, when no more than so many stages' copies came after its."""
        if self.pending[0] != NOTHING:
            cute.arch.cp_async_wait_group(later)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                space = cute.AddressSpace.smem
                barrier = cute.make_ptr(Int64, self.pending[0], space, assumed_align=8)
                cute.arch.mbarrier_arrive(barrier)


def _of_lane(address: Int64, lane) -> Int64:
    low, high = (
        cute.arch.shuffle_sync(half, lane) for half in (Int32(address), Int32(address >> 32))
    )
    return Int64(high) << 32 | Int64(Uint32(low))
