"""The widening warps of the producer warpgroup: bytes of K and V -> 16 bits, which Q has.

A matrix product takes two operands of one kind. Bytes arrive by TMA in rings of their own, and
every value of e4m3 is one of fp16 and of bf16, so that nothing is lost on the way; the scales of
heads wait for the scores, and for O.

A lane moves 16 bytes to 32. Eight lanes, which shared memory serves at once, take four chunks of
two rows whose numbers differ in the lowest and in the highest of three bits: no swizzle brings two
of them to the same banks, neither where they read nor where they write.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...widened import widened
from ..rings import FwdRings
from ..rows import RowLayout

WIDENING_WARPS = 3  # 1 .. 3 of the producer warpgroup
CHUNK = 16  # elements


@cute.jit
def widen(plan: cutlass.Constexpr, rings: FwdRings, work: Any, worker, lane):
    """Fill the rings of K and V, tile after tile, in the order of load()."""
    k_bytes, v_bytes = rings.k_loaded.consumer(), rings.v_loaded.consumer()
    k, v = rings.k.producer(), rings.v.producer()
    keys = Rows.of(rings.k_loaded.buffer, 0), Rows.of(rings.k.buffer, 0)
    values = Rows.of(rings.v_loaded.buffer, 1), Rows.of(rings.v.buffer, 1)
    tile = work.first()
    while tile.is_valid:
        blocks = work.blocks_of(tile)
        source, target = k_bytes.wait_and_advance(), k.acquire_and_advance()
        _widen(keys, source, target, worker, lane)
        for _ in cutlass.range(blocks.count - 1, unroll=1):
            source, target = k_bytes.wait_and_advance(), k.acquire_and_advance()
            _widen(keys, source, target, worker, lane)
            source, target = v_bytes.wait_and_advance(), v.acquire_and_advance()
            _widen(values, source, target, worker, lane)
        source, target = v_bytes.wait_and_advance(), v.acquire_and_advance()
        _widen(values, source, target, worker, lane)
        tile = work.next(tile)


@dataclass(frozen=True)
class Rows:
    """The stages of a ring by rows of bytes."""

    dtype: cutlass.Constexpr[type]
    layout: cutlass.Constexpr[RowLayout]
    base: Int32  # an address that is a multiple of 1024

    @staticmethod
    def of(buffer: cute.Tensor, row_mode: int) -> "Rows":
        dtype = buffer.element_type
        width = cute.size(buffer, mode=[1 - row_mode]) * dtype.width // 8
        layout = RowLayout(cute.size(buffer, mode=[row_mode]), width)
        return Rows(dtype, layout, Int32(buffer.iterator.toint()))

    def chunk(self, stage, first_row, byte: int, within, size: int) -> cute.Tensor:
        """16 bytes, as so many elements.

        first_row: a multiple of 8, as which it does not meet the swizzle; byte: of a row's, that
        `within` does not tell.
        """
        rows, span = self.layout.rows, self.layout.span
        offset = stage * self.layout.bytes + first_row * span + byte // span * rows * span
        address = self.base + offset + within
        space = cute.AddressSpace.smem
        pointer = cute.make_ptr(self.dtype, address, space, assumed_align=16)
        return cute.make_tensor(pointer, cute.make_layout(size))


@cute.jit
def _widen(tensors: tuple, source: Any, target: Any, worker, lane):
    """A stage of bytes into one of 16 bits."""
    given, wide = tensors
    chunks = 4 if given.layout.width % 64 == 0 else 2  # of a row, side by side, that a warp moves
    row, chunk = lane // 8 ^ 5 * (lane // 4 % 2), lane % 4
    if cutlass.const_expr(chunks == 2):
        row, chunk = lane // 2, lane % 2
    columns, rows = CHUNK * chunks, 32 // chunks  # at once
    halves = [wide.layout.within(row, 2 * CHUNK * chunk + 16 * half) for half in (0, 1)]
    for i in cutlass.range(worker, given.layout.rows // rows, WIDENING_WARPS, unroll=1):
        loaded = [
            _loaded(given, source.index, rows * i, column, row, chunk)
            for column in range(0, given.layout.width, columns)
        ]
        for j, part in enumerate(loaded):
            _store_widened(wide, target.index, rows * i, 2 * columns * j, halves, part)
    cute.arch.sync_warp()  # one lane releases for all
    source.release()
    cute.arch.fence_view_async_shared()
    target.commit()


def _loaded(given: Rows, stage, first_row, column: int, row, chunk) -> cute.Tensor:
    within = given.layout.within(row, CHUNK * chunk + column % given.layout.span)
    loaded = cute.make_rmem_tensor(CHUNK, given.dtype)
    cute.autovec_copy(given.chunk(stage, first_row, column, within, CHUNK), loaded)
    return loaded


def _store_widened(wide: Rows, stage, first_row, byte: int, halves: list, loaded: cute.Tensor):
    made = widened(loaded, wide.dtype)
    for half, within in enumerate(halves):
        part = cute.make_tensor(made.iterator + 8 * half, cute.make_layout(8))
        cute.autovec_copy(part, wide.chunk(stage, first_row, byte, within, 8))
