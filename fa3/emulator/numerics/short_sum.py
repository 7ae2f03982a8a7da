"""The short accumulator of Hopper's wgmma on FP8 operands.

One wgmma adds its 32 products and the accumulator in one fixed-point sum:
    1. a product's exponent is the sum of its operands' (of a subnormal: the type's smallest)
    2. every term is cut, toward zero, to 13 fraction bits below the largest exponent of all terms
    3. the terms are added exactly
    4. the sum is normalised and cut, toward zero, to 13 fraction bits (f32), or rounded to f16
So an f32 accumulator keeps 1 + 8 + 13 of its bits.

Sources: MMA-Sim (arXiv 2511.10909 and its code), which found this by tests on H100 and compared it
bit by bit.  Of the reports before it, SageAttention2 (arXiv 2411.10958) found the 22 bits that an
accumulator keeps, and DeepSeek-V3 (arXiv 2412.19437, 3.5.2) the alignment to 14 bits.
Not compared with a GPU by this project.  The exponent of a zero operand (-126) is taken from
MMA-Sim; it matters only where every product is zero.
"""

from __future__ import annotations

import numpy as np

from .formats import f2, f4

K = 32  # products of one sum
FRACTION = 13
_ZERO = -126  # exponent of zero
SMALLEST = {"e4m3": -6, "e5m2": -14, "f32": -126, "f16": -14}  # exponents
_NAN = np.array([0x7FFFFFFF], np.uint32).view(f4)


def _exponents(x, kind: str) -> np.ndarray:
    e = (x.view(np.uint32) >> np.uint32(23)).astype(np.int16) & np.int16(0xFF)
    e = np.maximum(e - np.int16(127), np.int16(SMALLEST[kind]))
    return np.where(x == 0, np.int16(_ZERO), e)


def add_products(c, a, b, types: tuple[str, str, str]) -> np.ndarray:
    """c + a b^T for f32 arrays c (m, n), a (m, 32), b (32, n) holding values of the types D, A, B.

    Returns values of type D as f32.
    """
    d_type, a_type, b_type = types
    a_exponents, b_exponents = _exponents(a, a_type), _exponents(b, b_type)
    top = _exponents(c, d_type)
    sums = np.empty_like(top)
    for i in range(a.shape[1]):
        np.add(a_exponents[:, i, None], b_exponents[i], out=sums)
        np.maximum(top, sums, out=top)
    shift = FRACTION - top.astype(np.int32)
    total = np.trunc(np.ldexp(c, shift))
    scale = np.ldexp(f4(1), np.minimum(shift, 127))
    term = np.empty_like(total)
    for i in range(a.shape[1]):
        np.multiply(a[:, i, None], b[i], out=term)
        term *= scale
        total += np.trunc(term, out=term)
    result = _normalised(np.ldexp(total, -shift), d_type)
    if not all(np.isfinite(x).all() for x in (a, b, c)):
        plain = c + a @ b
        result = np.where(np.isfinite(plain), result, np.where(np.isnan(plain), _NAN, plain))
    return result


def _normalised(x, d_type: str) -> np.ndarray:
    if d_type == "f16":
        return x.astype(f2).astype(f4)
    kept = np.uint32(-(1 << 23 - FRACTION) & 0xFFFFFFFF)
    return (x.view(np.uint32) & kept).view(f4) + f4(0)  # -0 becomes 0
