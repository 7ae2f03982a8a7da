"""Epilogue for one-byte inputs: O from registers to global memory."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

CHANNELS = 16  # that are transposed together; the four lanes of a row hold 4 of them each


@cute.jit
def store_output(
    mO: cute.Tensor,  # (s_q, dv) of a head
    acc_O: cute.Tensor,  # ((2, 2, slice / 8), 1, slices)
    factors: cute.Tensor,  # (2,) by what to multiply a row
    scales: cute.Tensor,  # (1,) or (dv,) by what to multiply a channel
    row: Any,  # of this thread's first row; the second one is 8 below
    lane: Any,
):
    """A quad writes 16 neighbouring channels of a row: 32 or 64 bytes, whole sectors.

    Transposed V holds channels 0, 2, .. 14, 1, 3, .. 15 of every 16 (fp8_load), so that column c of
    a thread's pair in the first and second 8 columns are channels 4 (lane % 4) + 2 c and the next.
    """
    num_rows, num_channels = mO.shape
    for part in cutlass.range_constexpr(cute.size(acc_O) // 8):
        channel = CHANNELS * part + 4 * (lane % 4)
        if channel < num_channels:
            four_scales = _scales(scales, channel)
            for r in cutlass.range_constexpr(2):
                four = cute.make_rmem_tensor(4, mO.element_type)
                for i in cutlass.range_constexpr(4):
                    value = acc_O[8 * part + 4 * (i % 2) + 2 * r + i // 2]
                    four[i] = (value * factors[r] * four_scales[i]).to(mO.element_type)
                if row + 8 * r < num_rows:
                    target = cute.local_tile(mO, (1, 4), (row + 8 * r, channel // 4))
                    cute.autovec_copy(four, cute.make_tensor(target.iterator, cute.make_layout(4)))


def _scales(scales: cute.Tensor, channel) -> list[Float32]:
    if cute.is_static(scales.shape) and cute.size(scales) == 1:
        return 4 * [scales[0]]
    return [scales[channel + i] for i in range(4)]
