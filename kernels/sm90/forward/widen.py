"""The widening warps of the producer warpgroup: bytes of K and V -> 16 bits, which Q has.

A matrix product takes two operands of one kind. Bytes arrive by TMA in rings of their own, and
every value of e4m3 is one of fp16 and of bf16, so that nothing is lost on the way; the scales of
heads wait for the scores, and for O.

A lane moves 16 bytes to 32. Eight lanes, which shared memory serves at once, take four chunks of
two rows whose numbers differ in the lowest and in the highest of three bits: no swizzle brings two
of them to the same banks, neither where they read nor where they write.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..rings import FwdRings

WIDENING_WARPS = 3  # 1 .. 3 of the producer warpgroup
CHUNK = 16  # elements
UNPACK = "cvt.rn.f16x2.e4m3x2 {$w0}, low; cvt.rn.f16x2.e4m3x2 {$w1}, high;"


@cute.jit
def widen(plan: cutlass.Constexpr, rings: FwdRings, work: Any, worker, lane):
    """Fill the rings of K and V, tile after tile, in the order of load()."""
    k_bytes, v_bytes = rings.k_loaded.consumer(), rings.v_loaded.consumer()
    k, v = rings.k.producer(), rings.v.producer()
    keys = _by_rows(rings.k_loaded, 0), _by_rows(rings.k, 0)
    values = _by_rows(rings.v_loaded, 1), _by_rows(rings.v, 1)
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


def _by_rows(ring: Any, row_mode: int) -> cute.Tensor:
    """(rows, columns, num_stages), columns side by side."""
    order = [row_mode, 1 - row_mode, 2]
    return cute.make_tensor(ring.buffer.iterator, cute.select(ring.buffer.layout, mode=order))


@cute.jit
def _widen(tensors: tuple, source: Any, target: Any, worker, lane):
    """A stage of bytes into one of 16 bits."""
    given, wide = tensors
    given, wide = given[None, None, source.index], wide[None, None, target.index]
    rows, columns = cute.size(given, mode=[0]), cute.size(given, mode=[1])
    chunks = 4 if columns % 64 == 0 else 2  # of a row, side by side, that a warp moves at once
    rows_at_once = 32 // chunks
    row, chunk = lane // 8 ^ 5 * (lane // 4 % 2), lane % 4
    if cutlass.const_expr(chunks == 2):
        row, chunk = lane // 2, lane % 2
    across = columns // (CHUNK * chunks)
    for i in cutlass.range(worker, rows // rows_at_once * across, WIDENING_WARPS, unroll=1):
        down = i // across
        at = down * rows_at_once + row, (i - down * across) * chunks + chunk
        loaded = cute.make_rmem_tensor(CHUNK, given.element_type)
        cute.autovec_copy(_chunk(given, *at, CHUNK), loaded)
        made = widened(loaded, wide.element_type)
        for half in cutlass.range_constexpr(2):
            part = cute.make_tensor(made.iterator + half * 8, cute.make_layout(8))
            cute.autovec_copy(part, _chunk(wide, at[0], 2 * at[1] + half, 8))
    cute.arch.sync_warp()  # one lane releases for all
    source.release()
    cute.arch.fence_view_async_shared()
    target.commit()


def widened(source: cute.Tensor, dtype: type) -> cute.Tensor:
    """e4m3 registers -> 16-bit registers in the same order."""
    target = cute.make_rmem_tensor(cute.size(source), dtype)
    words, pairs = cute.recast_tensor(source, Int32), cute.recast_tensor(target, Int32)
    for i in range(cute.size(words)):
        halves = cute.arch.inline_ptx(
            f"{{ .reg .b16 low, high; mov.b32 {{low, high}}, {{$r0}}; {UNPACK} }}",
            write_only_types=[Int32, Int32],
            read_only_args=[words[i]],
        )
        for j, half in enumerate(halves):
            pairs[2 * i + j] = half if dtype is cutlass.Float16 else _to_bf16(half)
    return target


def _to_bf16(pair: Int32) -> Int32:
    """Two fp16 -> two bf16, exact for what came of e4m3."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 low, high; .reg .f32 a, b; mov.b32 {low, high}, {$r0};"
        " cvt.f32.f16 a, low; cvt.f32.f16 b, high; cvt.rn.bf16x2.f32 {$w0}, b, a; }",
        write_only_types=[Int32],
        read_only_args=[pair],
    )


def _chunk(tensor: cute.Tensor, row, chunk, size: int) -> cute.Tensor:
    """So many elements of a row, 16 bytes that lie side by side."""
    part = cute.local_tile(tensor, (1, size), (row, chunk))
    return cute.make_tensor(part.iterator.align(16), cute.make_layout(size))
