"""Epilogue: O through shared memory, where Q was, to 16-byte stores; LSE from registers."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...scheduler import WorkTile
from ...sequence import Sequence
from ...views import convert
from ..copies import CHUNK, TileLayout, kept
from ..mma import ROWS
from .pair import Pair


@dataclass(frozen=True)
class Place:
    """Where a row group's results belong."""

    tile: WorkTile
    sequence: Sequence
    lane: Any
    first_row: Any  # query of the tile's first row
    offset: Any  # of the group's first row in the tile
    part: Any  # of the columns of O that the warp has

    @property
    def row(self):
        """Query of the thread's first row; the second one is 8 below."""
        return self.first_row + self.offset + self.lane // 4


@cute.jit
def store_output(
    mO: cute.Tensor,
    acc_O: cute.Tensor,
    layout: TileLayout,
    space: cute.Pointer,
    place: Place,
    pair: Pair | None,
):
    """16 rows of O; the caller sees to it that no other warp has something where they go.

    mO: (s_q, dv, h_q, b); acc_O: ((2, 2, dv / 8), 1, 1), normalised.
    """
    queries = place.sequence.queries
    lane = kept(place.lane)  # its addresses would be computed ahead of all tiles, and spill
    matrix = queries.matrix(mO, place.tile.head)  # (s_q, dv)
    acc_16 = cute.make_rmem_tensor_like(acc_O, space.value_type)
    convert(acc_O, acc_16)
    pairs = cute.recast_tensor(acc_16, Int32)  # (row, 8 columns)
    parts = layout.width // (2 * cute.size(acc_O))
    chunks = layout.chunks // parts  # of the warp, in each column block
    for j in cutlass.range_constexpr(layout.blocks * chunks):
        for r in cutlass.range_constexpr(2):
            row = place.offset + 8 * r + lane // 4
            chunk = j % chunks + place.part * chunks
            at = layout.offset(row, chunk, j // chunks) + 2 * (lane % 4)
            _word(space + at)[0] = pairs[2 * j + r]
    if cutlass.const_expr(pair is None):
        cute.arch.sync_warp()
    else:
        pair.meet()

    step = 32 // layout.chunks
    row, chunk = lane // layout.chunks, lane % layout.chunks
    for i in cutlass.range_constexpr(ROWS // step // parts):
        local = place.offset + row + (i * parts + place.part) * step
        query = place.first_row + local
        if query < queries.length:
            for block in cutlass.range_constexpr(layout.blocks):
                column = block * layout.columns + chunk * CHUNK
                if column < matrix.shape[1]:
                    source = _chunk(space + layout.offset(local, chunk, block))
                    target = cute.local_tile(matrix, (1, CHUNK), (query, column // CHUNK))
                    cute.autovec_copy(source, _chunk(target.iterator))


def _word(pointer: cute.Pointer) -> cute.Tensor:
    return cute.make_tensor(cute.recast_ptr(pointer.align(4), dtype=Int32), cute.make_layout(1))


def _chunk(pointer: cute.Pointer) -> cute.Tensor:
    return cute.make_tensor(pointer.align(16), cute.make_layout(CHUNK))
