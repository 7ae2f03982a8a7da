"""wgmma matrix descriptors: which 16-byte chunks of shared memory hold an operand.

    bits 0-13 start address, 16-29 leading byte offset (LBO), 32-45 stride byte offset (SBO), all
    >> 4; 49-51 base offset; 62-63 layout: 0 plain, 1 swizzle 128B, 2 64B, 3 32B

With W the bytes of a swizzled row (32, 64, 128), r the row, k the byte along K, m the byte along
the rows and c the K index, an element lies at
    K-major:   swizzled (r/8)*SBO + (r%8)*W + k         plain (r/8)*SBO + (r%8)*16 + (k/16)*LBO
    MN-major:  swizzled (m/W)*LBO + m%W + (c%8)*W + (c/8)*SBO
               plain    (m/16)*SBO + (c%8)*16 + (c/8)*LBO
from the start; swizzles then permute absolute address bits, so that adding 32 bytes to a start
steps along K correctly.
"""

from __future__ import annotations

import functools

import numpy as np

from ..errors import Unsupported

CHUNK = 16
STEP_BYTES = 32  # of K in one wgmma, whatever the type
_MASK = {0: 0, 3: 1, 2: 3, 1: 7}  # layout -> xor mask on chunk indices


@functools.lru_cache(maxsize=2048)
def chunks(starts: tuple[int, ...], rows: int, es: int, mn_major: bool) -> np.ndarray:
    """Chunk indices of the operands of consecutive wgmmas, joined along K.

    es is the element size in bytes, and n the number of descriptors.
    K-major: (rows, 2 n), each row contiguous along K.
    MN-major: (n * 32 / es, rows * es / 16), each row contiguous along the rows of the operand.
    """
    axis = 0 if mn_major else 1
    return np.concatenate([_chunks(d, rows, es, mn_major) for d in starts], axis)


def _chunks(desc: int, rows: int, es: int, mn_major: bool) -> np.ndarray:
    start = desc & 0x3FFF
    lbo, sbo = (desc >> 16) & 0x3FFF, (desc >> 32) & 0x3FFF  # in chunks
    if (desc >> 49) & 7:
        raise Unsupported(f"wgmma descriptor {desc:#x} with a base offset")
    mask = _MASK[(desc >> 62) & 3]
    width = mask + 1  # chunks of one swizzled row
    if mn_major:
        c, j = np.ogrid[: STEP_BYTES // es, : rows * es // CHUNK]
        offset = (
            (j // width) * lbo + j % width + (c % 8) * width + (c // 8) * sbo
            if mask
            else j * sbo + c % 8 + (c // 8) * lbo
        )
    else:
        r, j = np.ogrid[:rows, : STEP_BYTES // CHUNK]
        offset = (r // 8) * sbo + (r % 8) * width + j if mask else (r // 8) * sbo + r % 8 + j * lbo
    chunk = start + offset
    return chunk ^ ((chunk >> 3) & mask)
