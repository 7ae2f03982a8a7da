"""bf16 and fp8 coding, packed 16-bit pairs."""

from __future__ import annotations

import functools

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
f2, f4, f8 = np.float16, np.float32, np.float64
_SMALLEST_NORMAL = {np.dtype(t): np.finfo(t).tiny for t in (f2, f4)}


def bf16_to_f32(x):
    return (x.astype(u4) << u4(16)).view(f4)


def f32_to_bf16(x, toward_zero: bool = False):
    """Round to nearest even (or toward zero); every NaN becomes 0x7FFF, as on the hardware."""
    b = np.ascontiguousarray(x, f4).view(u4)
    if toward_zero:
        rounded = b >> u4(16)
    else:
        rounded = (b + (u4(0x7FFF) + ((b >> u4(16)) & u4(1)))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def f32_to_f16(x, toward_zero: bool = False):
    """Round to nearest even (or toward zero); every NaN becomes 0x7FFF."""
    h = x.astype(f2)
    h.view(u2)[np.isnan(h)] = 0x7FFF
    if toward_zero:
        over = np.abs(h.astype(f4)) > np.abs(x)
        h = np.where(over, (h.view(u2) - u2(1)).view(f2), h)
    return h


def _fp8_table(exp_bits: int, man_bits: int, bias: int, finite: bool):
    """The value of each of the 256 codes; `finite` formats have no infinities and one NaN."""
    table = np.zeros(256, f4)
    top = (1 << exp_bits) - 1
    for code in range(256):
        e, m = (code >> man_bits) & top, code & ((1 << man_bits) - 1)
        if e == 0:
            value = m * 2.0 ** (1 - bias - man_bits)
        elif e == top and finite and m == (1 << man_bits) - 1:
            value = np.nan
        elif e == top and not finite:
            value = np.nan if m else np.inf
        else:
            value = (1 + m / (1 << man_bits)) * 2.0 ** (e - bias)
        table[code] = -value if code & 0x80 else value
    return table


FP8 = {"e4m3": _fp8_table(4, 3, 7, True), "e5m2": _fp8_table(5, 2, 15, False)}
_LARGEST = {"e4m3": 0x7E, "e5m2": 0x7B}
_FP8_NAN = u1(0x7F)


def f32_to_fp8(x, kind: str):
    """Round to nearest even; overflow saturates (PTX requires .satfinite), NaN becomes 0x7F."""
    b = np.ascontiguousarray(x, f4).view(u4)
    # the upper half decides, and whether anything is below it: that is no tie then
    return _fp8_of_upper_half(kind)[(b >> u4(16)) | ((b & u4(0xFFFF)) != 0)]


@functools.cache
def _fp8_of_upper_half(kind: str):
    """The code of each f32 whose lower 16 bits are zero."""
    return _round_to_fp8((np.arange(1 << 16, dtype=u4) << u4(16)).view(f4), kind)


def _round_to_fp8(x, kind: str):
    top = _LARGEST[kind]
    grid = FP8[kind][: top + 1].astype(f8)
    middle = (grid[:-1] + grid[1:]) / 2
    a = np.abs(x).astype(f8)
    i = np.searchsorted(middle, a, side="left")
    tie = (i < top) & (a == middle[np.minimum(i, top - 1)])
    i = np.where(tie & (i & 1 == 1), i + 1, i)  # a tie went to the lower code: make it even
    code = np.minimum(i, top).astype(u1) | (np.signbit(x).astype(u1) << u1(7))
    return np.where(np.isnan(x), _FP8_NAN, code)


def flush(x):
    """.ftz on a fresh array of f32 or f16: subnormal values become zeros of their sign."""
    x[np.abs(x) < _SMALLEST_NORMAL[x.dtype]] *= x.dtype.type(0)
    return x


def flushed(x):
    """The same, on a copy."""
    return flush(x.copy())


def flushing(f):
    """f on flushed operands, with its results flushed."""
    return lambda *operands: flush(f(*map(flushed, operands)))


def fma(a, b, c):
    """Of f32: the product is exact in double, so that only the sum may be rounded twice."""
    return (a.astype(f8) * b + c).astype(f4)


def inverse_sqrt(x):
    return np.reciprocal(np.sqrt(x))


def rows(x, n: int):
    """x as a row of n lanes (a constant is a row of one)."""
    return x if len(x) == n else np.broadcast_to(x, (n,))


def low_half(x):
    return (x & u4(0xFFFF)).astype(u2)


def high_half(x):
    return (x >> u4(16)).astype(u2)


def join_halves(lo, hi):
    """Two rows of 16 bits -> one of 32."""
    return lo.astype(u4) | (hi.astype(u4) << u4(16))


def halves(x, kind: str):
    """32-bit lanes -> (low and high, lanes) floats to compute in."""
    if kind == "bf16":
        return np.stack([x << u4(16), x & u4(0xFFFF0000)]).view(f4)
    return np.stack([low_half(x), high_half(x)]).view(f2)


def unhalves(x, kind: str):
    """(low and high, lanes) floats -> 32-bit lanes"""
    return join_halves(*(f32_to_bf16(x) if kind == "bf16" else x.astype(f2).view(u2)))
