"""Tiles of rows in shared memory: where their elements lie, and cp.async that brings them there.

A tile is stored in column blocks of 64 columns (32 where the width is no multiple of 64), each of
them row after row in chunks of 8 columns, 16 bytes.  A row's chunks are permuted, so that 8 rows of
one chunk, which ldmatrix reads at once, lie in different banks:

    64 columns, 128 B a row   chunk c of row r at  c ^ (r % 8)
    32 columns,  64 B a row   chunk c of row r at  c ^ (r / 2 % 4)
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from ..async_copy import copy_chunk
from .config import block_columns

CHUNK = 8  # 16-bit elements, 16 bytes


@dataclass(frozen=True)
class TileLayout:
    """A tile (rows, width) of 16-bit elements in shared memory."""

    rows: int
    width: int

    @property
    def columns(self) -> int:
        """Of a column block."""
        return block_columns(self.width)

    @property
    def blocks(self) -> int:
        return self.width // self.columns

    @property
    def chunks(self) -> int:
        """Of a row in a column block."""
        return self.columns // CHUNK

    @property
    def elements(self) -> int:
        return self.rows * self.width

    def offset(self, row, chunk, block=0):
        """Of a chunk of a column block, in elements."""
        turn = row % 8 if self.columns == 64 else row // 2 % 4
        return (block * self.rows + row) * self.columns + (chunk ^ turn) * CHUNK


@dataclass(frozen=True)
class RowCopy:
    """This thread's part of the copies of tiles of one matrix.

    8 threads (4) take a row of a column block, all threads together `step` rows of it at a time.
    """

    layout: cutlass.Constexpr[TileLayout]
    step: cutlass.Constexpr[int]
    source: Int64  # address of the thread's first chunk in the matrix's first rows
    stride: Int64  # bytes from row to row
    row: Int32  # of the thread's first chunk
    length: Int32  # rows of the matrix that count
    sizes: tuple  # bytes to read of a chunk, by column block: 16, or 0 beyond the true width
    target: Int32  # address of the thread's first chunk in shared memory

    @staticmethod
    def thread_offset(layout: TileLayout, thread) -> Int32:
        """Of the thread's first chunk in shared memory, in bytes from the tile."""
        return 2 * layout.offset(thread // layout.chunks, thread % layout.chunks)

    @staticmethod
    @cute.jit
    def of(
        layout: TileLayout, num_threads: int, thread, matrix, length, pointer, offset, may_lack=1
    ):
        """matrix: (rows, width) in global memory; pointer: to the tile, or to its first stage.

        offset: `thread_offset(layout, thread)`, which tiles of the same columns share.
        may_lack: only so many last column blocks may lie beyond the true width; one, where the
            tile is the narrowest that holds it.
        """
        chunks, element = layout.chunks, 2
        row, chunk = thread // chunks, thread % chunks
        sizes = [Int32(16)] * layout.blocks
        for block in cutlass.range_constexpr(max(0, layout.blocks - may_lack), layout.blocks):
            is_inside = block * layout.columns + chunk * CHUNK < matrix.shape[1]
            sizes[block] = Int32(16) if is_inside else Int32(0)
        stride = Int64(matrix.stride[0]) * element
        source = matrix.iterator.toint() + Int64(row) * stride + chunk * CHUNK * element
        source = kept_address(source)
        target = Int32(pointer.toint()) + offset
        step = num_threads // chunks
        return RowCopy(layout, step, source, stride, row, length, tuple(sizes), target)

    @cute.jit
    def issue(self, tile, stage, is_partial: cutlass.Constexpr[bool]):
        """Copy the tile-th tile of rows.

        is_partial: it may reach beyond the rows that count; those become zeros.
        """
        layout = self.layout
        first = tile * layout.rows
        target = self.target + stage * (layout.elements * 2)
        source = self.source + Int64(first) * self.stride
        for i in cutlass.range_constexpr(layout.rows // self.step):
            is_inside = True
            if cutlass.const_expr(is_partial):
                is_inside = first + i * self.step + self.row < self.length
            for block in cutlass.range_constexpr(layout.blocks):
                size = self.sizes[block]
                if cutlass.const_expr(is_partial):
                    size = size if is_inside else Int32(0)
                to = target + (block * layout.rows + i * self.step) * layout.columns * 2
                copy_chunk(to, source + block * layout.columns * 2, size)
            source += self.step * self.stride


def kept(x: Int32) -> Int32:
    """x, in a register: ptxas computes it again at each step of a loop if it sees how."""
    return cute.arch.shuffle_sync_bfly(x, 0)


def kept_address(x: Int64) -> Int64:
    low, high = kept(Int32(x)), kept(Int32(x >> 32))
    return Int64(high) << 32 | Int64(Uint32(low))


def address_in(base: Int64, index: Int32, size: int, offset: Int32) -> Int64:
    """base + size index + offset, summed up where it is needed: no part of it stays in registers.

    offset: in bytes, not negative.
    """
    return cute.arch.inline_ptx(
        f"{{ .reg .b64 a, b; cvt.u64.u32 a, {{$r2}}; mad.wide.s32 b, {{$r1}}, {size}, {{$r0}};"
        " add.s64 {$w0}, a, b; }",
        write_only_types=[Int64],
        read_only_args=[base, index, offset],
    )


def commit():
    cute.arch.cp_async_commit_group()


def wait_for_all():
    """This thread's copies; those of others by the barrier that follows."""
    cute.arch.cp_async_wait_group(0)
    cute.arch.sync_threads()
