"""Epilogue for FP8: O from registers to global memory."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from ...softmax import Totals
from ...tensors import FwdTensors
from .store import Place

CHANNELS = 16  # that are transposed together; the four lanes of a row hold 4 of them each


@cute.jit
def store_output(
    tensors: FwdTensors,
    frag: Any,  # holds O, normalised; scales by head or channel are still to come
    totals: Totals,  # without a key the weights add up to 0, and so does the shift
    place: Place,
):
    """A quad writes 16 neighbouring channels of a row: 32 or 64 bytes, whole sectors.

    Transposed V holds channels 0, 2, .. 14, 1, 3, .. 15 of every 16 (transpose.py), so that column
    c of a thread's pair in the first and second 8 columns are channels 4 (lane % 4) + 2 c and the
    next.
    """
    tile, sequence, row, lane = place.tile, place.sequence, place.row, place.thread % 32
    mO = sequence.queries.matrix(tensors.o, tile.head)  # (s_q, dv)
    mShift = sequence.vector(tensors.scales.v_shift, tile.head_kv)  # (dv,)
    num_rows, num_channels = sequence.s_q, mO.shape[1]
    for part in cutlass.range_constexpr(cute.size(frag.o) // 8):
        channel = CHANNELS * part + 4 * (lane % 4)
        if channel < num_channels:
            factors = _factors(frag, channel)
            shift = cute.make_rmem_tensor(4, Float32)
            cute.autovec_copy(cute.local_tile(mShift, (4,), (channel // 4,)), shift)
            for r in cutlass.range_constexpr(2):
                four = cute.make_rmem_tensor(4, mO.element_type)
                for i in cutlass.range_constexpr(4):
                    value = frag.o[8 * part + 4 * (i % 2) + 2 * r + i // 2]
                    value = cute.math.fma(value, factors[i], shift[i] * totals.weight[r])
                    four[i] = value.to(mO.element_type)
                if row + 8 * r < num_rows:
                    target = cute.local_tile(mO, (1, 4), (row + 8 * r, channel // 4))
                    cute.autovec_copy(four, cute.make_tensor(target.iterator, cute.make_layout(4)))


def _factors(frag: Any, channel) -> list[Float32]:
    """The scales of V that O still lacks, for four channels."""
    if frag.scales.quantised.v_block:  # they are in O
        return 4 * [Float32(1.0)]
    return [frag.scales.v[channel + i] for i in range(4)]
