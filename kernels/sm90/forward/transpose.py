"""The transposing warps of the producer warpgroup: V by keys -> V by channels.

wgmma takes one-byte operands only with the contracted mode contiguous, which for P V is the keys,
while memory and TMA bring V with its channels contiguous.  A unit of work is 32 keys by 16
channels:

    ldmatrix.trans    pairs of bytes move as 16-bit elements: each lane gets channels 2c, 2c + 1
                      of the keys 2q, 2q + 1 (c = lane / 4, q = lane % 4), for four groups of 8 keys
    prmt              separates the two channels and joins two groups of keys
    stmatrix          rows of 16 keys of one channel

Keys come to lie in the order in which the accumulator of Q K^T holds its columns, so that P becomes
an operand without an exchange between lanes (operands_fp8.pack).  Within 16 channels the even ones
come first: stmatrix then writes 8 neighbouring rows, which the swizzle spreads over all banks
(store_fp8 puts the channels back).

Source: FlashAttention-3 (arXiv 2407.08608), section 3.3.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float16, Int16, Int32
from cutlass.cute.nvgpu import warp
from cutlass.tensor_utils import LayoutEnum

from ..rings import FwdRings
from ..wgmma import vt_rows

TRANSPOSING_WARPS = 3  # 1 .. 3 of the producer warpgroup
UNIT = (32, 16)  # keys, channels
TWO_ONES = {"e4m3": 0x3838, "e5m2": 0x3C3C}  # bit patterns of 1.0, twice
FIRST_BYTES, SECOND_BYTES = 0x6420, 0x7531  # of each 16 bits of two registers (prmt selectors)


@cute.jit
def transpose(plan: cutlass.Constexpr, rings: FwdRings, work: Any, worker, lane):
    """Fill the ring of transposed V, tile after tile, in the order of load()."""
    by_keys, by_channels = _pairs(plan, rings)
    _write_ones(plan, by_channels, worker, lane)
    v, vt = rings.v_by_keys.consumer(), rings.v.producer()
    tile = work.first()
    while tile.is_valid:
        blocks = work.blocks_of(tile)
        for _ in cutlass.range(blocks.count, unroll=1):
            source = v.wait_and_advance()
            target = vt.acquire_and_advance()
            rows, columns = by_keys[None, None, source.index], by_channels[None, None, target.index]
            _transpose_stage(plan, rows, columns, worker, lane)
            cute.arch.sync_warp()  # one lane releases for all
            source.release()
            cute.arch.fence_view_async_shared()
            target.commit()
        tile = work.next(tile)


def _pairs(plan, rings: FwdRings) -> tuple[cute.Tensor, cute.Tensor]:
    """Both rings as 16-bit elements: (tile_n, dv / 2, num_stages) and (dv, tile_n / 2, ..)."""
    stages, dv, tile_n = plan.config.num_stages, plan.head_dim_v, plan.tile_n
    channels = vt_rows(plan.signature, plan.config)
    views = []
    for ring, rows, columns in ((rings.v_by_keys, tile_n, dv), (rings.v, channels, tile_n)):
        shape = (rows, 0, columns // 2)
        layout = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, shape, Float16, stages)
        pointer = cute.recast_ptr(ring.buffer.iterator, layout.inner, dtype=Int16)
        views.append(cute.make_tensor(pointer, layout.outer))
    return tuple(views)


@cute.jit
def _write_ones(plan: cutlass.Constexpr, by_channels: cute.Tensor, worker, lane):
    """The rows of transposed V that no V is written to (wgmma.vt_rows), in every stage."""
    first = plan.head_dim_v
    rows, pairs = cute.size(by_channels, mode=[0]) - first, cute.size(by_channels, mode=[1])
    count = rows * pairs * plan.config.num_stages
    for i in cutlass.range(32 * worker + lane, count, 32 * TRANSPOSING_WARPS):
        row, pair = i // pairs % rows, i % pairs
        by_channels[first + row, pair, i // (rows * pairs)] = Int16(
            TWO_ONES[plan.signature.quantised.v]
        )


@cute.jit
def _transpose_stage(plan: cutlass.Constexpr, rows, columns, worker, lane):
    load_op = warp.LdMatrix8x8x16bOp(transpose=True, num_matrices=4)
    load_atom = cute.make_copy_atom(load_op, Int16)
    store_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), Int16)
    for channel_unit in cutlass.range(worker, plan.head_dim_v // UNIT[1], TRANSPOSING_WARPS):
        channel = UNIT[1] * channel_unit + lane % 16
        for key_unit in cutlass.range_constexpr(plan.tile_n // UNIT[0]):
            loaded, stored = (cute.make_rmem_tensor(8, Int16) for _ in range(2))
            cute.copy(load_atom, _row(rows, UNIT[0] * key_unit + lane, channel_unit), loaded)
            a, b = (cute.recast_tensor(t, Int32) for t in (loaded, stored))
            for half in cutlass.range_constexpr(2):
                low, high = a[2 * half], a[2 * half + 1]
                b[2 * half] = cute.arch.prmt(low, high, Int32(FIRST_BYTES))
                b[2 * half + 1] = cute.arch.prmt(low, high, Int32(SECOND_BYTES))
            cute.copy(store_atom, stored, _row(columns, channel, 2 * key_unit + lane // 16))


def _row(pairs: cute.Tensor, row, chunk) -> cute.Tensor:
    """16 bytes of a row, as ldmatrix and stmatrix take them: (8,) 16-bit."""
    part = cute.local_tile(pairs, (1, 8), (row, chunk))
    return cute.make_tensor(part.iterator, cute.make_layout(8))
