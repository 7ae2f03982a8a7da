"""Accumulators through shared memory to 16-byte stores: dK, dV and dQ."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...views import convert
from ..copies import CHUNK, TileLayout, kept
from ..mma import ROWS, SharedResult


def write(parts: tuple, result: SharedResult, columns: tuple, element: type, scale=None):
    """16 rows after 16 rows, times scale; columns: the first of each 16 columns."""
    for m, acc in enumerate(parts):
        if scale is not None:
            acc.store(acc.load() * scale)
        acc_16 = cute.make_rmem_tensor_like(acc, element)
        convert(acc, acc_16)
        words = cute.recast_tensor(acc_16, Int32)  # (row, 8 columns)
        for j, column in enumerate(columns):
            for e in range(2):
                for r in range(2):
                    word = words[4 * j + 2 * e + r]
                    result.store(ROWS * m + 8 * r, column + 8 * e, word)


@cute.jit
def store_rows(
    matrix: cute.Tensor,
    layout: cutlass.Constexpr[TileLayout],
    space: cute.Pointer,
    first_row,
    length,
    thread,
    num_threads: cutlass.Constexpr[int],
):
    """Rows of a tile that exist; matrix: (rows, columns) in global memory."""
    thread = kept(thread)  # its addresses would be computed ahead of all tiles, and spill
    step = num_threads // layout.chunks
    row, chunk = thread // layout.chunks, thread % layout.chunks
    for i in cutlass.range_constexpr(layout.rows // step):
        local = row + i * step
        if first_row + local < length:
            for block in cutlass.range_constexpr(layout.blocks):
                column = block * layout.columns + chunk * CHUNK
                if column < matrix.shape[1]:
                    source = _chunk(space + layout.offset(local, chunk, block))
                    place = first_row + local, column // CHUNK
                    target = cute.local_tile(matrix, (1, CHUNK), place)
                    cute.autovec_copy(source, _chunk(target.iterator))


def _chunk(pointer: cute.Pointer) -> cute.Tensor:
    return cute.make_tensor(pointer.align(16), cute.make_layout(CHUNK))
