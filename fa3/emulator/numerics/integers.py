"""Integer instructions that numpy has no function for."""

from __future__ import annotations

import numpy as np

from .formats import rows, u1, u4, u8

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: u4, 8: u8}


def mulhi(a, b):
    """The upper half of the product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else u8
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    pairs = zip(*np.broadcast_arrays(a, b), strict=True)
    return np.array([(int(x) * int(y) >> 64) % (1 << 64) for x, y in pairs], u8).view(a.dtype)


def product_of_24_bits(a, b, high: bool):
    """mul24: bits 0 to 31 of the product of the low 24 bits, or bits 16 to 47."""
    wide = np.int64 if a.dtype.kind == "i" else u8
    a, b = ((x.astype(wide) << wide(40)) >> wide(40) for x in (a, b))
    return (a * b >> wide(16 if high else 0)).astype(f"{a.dtype.kind}4")


def saturated(f, a, b):
    """f, of 32-bit integers, without overflow."""
    limits = np.iinfo(a.dtype)
    exact = f(a.astype(np.int64), b.astype(np.int64))
    return np.clip(exact, limits.min, limits.max).astype(a.dtype)


def difference(a, b):
    """|a - b|, modulo the width."""
    return np.maximum(a, b) - np.minimum(a, b)


def divide(a, b):
    """Quotient rounded toward zero; by zero, whatever."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    unsigned = _UNSIGNED[a.dtype.itemsize]  # which holds the magnitude of the least number, too
    q = (np.abs(a).view(unsigned) // np.abs(b).view(unsigned)).view(a.dtype)
    return np.where((a < 0) ^ (b < 0), -q, q)


def funnel_shift(lo, hi, n, left: bool, wrap: bool):
    n = ((n & u4(31)) if wrap else np.minimum(n, u4(32))).astype(u8)
    x = lo.astype(u8) | (hi.astype(u8) << u8(32))
    return ((x << n) >> u8(32)).astype(u4) if left else (x >> n).astype(u4)


def extract_bits(a, pos, n):
    """bfe: n bits from pos, sign-extended for signed types."""
    bits = 8 * a.dtype.itemsize
    pos, n = np.broadcast_arrays(pos & u4(255), n & u4(255))
    x = a.astype(np.int64) if a.dtype.kind == "i" else a.astype(u8)
    n = np.minimum(n, u4(bits)).astype(x.dtype)
    pos = pos.astype(x.dtype)
    if a.dtype.kind == "i":
        pos = np.minimum(pos, 63)
        up = np.maximum(np.int64(64) - pos - n, 0)
        return np.where(n == 0, 0, (x << up) >> np.minimum(up + pos, 63)).astype(a.dtype)
    mask = np.where(n >= u8(64), ~u8(0), (u8(1) << n) - u8(1))
    return ((x >> pos) & mask).astype(a.dtype)


def insert_bits(a, b, pos, n):
    """bfi: the low n bits of a into b at pos."""
    bits = 8 * b.dtype.itemsize
    pos, n = (pos & u4(255)).astype(u8), np.minimum(n & u4(255), u4(bits)).astype(u8)
    mask = (((u8(1) << n) - u8(1)) << pos).astype(b.dtype)
    return (b & ~mask) | ((a.astype(u8) << pos).astype(b.dtype) & mask)


def dot(a, b, c, width: int, first: int, lanes: int):
    """dp4a (width 1) and dp2a (width 2: halves of a by the bytes of b from `first`)."""
    a, b, c = (np.ascontiguousarray(rows(x, lanes)) for x in (a, b, c))
    x = a.view(f"{a.dtype.kind}{width}").reshape(lanes, -1).astype(np.int64)
    y = b.view(f"{b.dtype.kind}1").reshape(lanes, 4)[:, first : first + x.shape[1]]
    return ((x * y.astype(np.int64)).sum(1) + c).astype(c.dtype)


def lop3(a, b, c, table: int):
    r = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), u4)
    for i in range(8):
        if table >> i & 1:
            r |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return r


# prmt mode -> selector of the default mode, by the two low bits of its own
_NIBBLES = np.arange(0, 16, 4, dtype=u4)
PERMUTE_MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


def permute_bytes(a, b, selector, mode: str | None = None):
    """prmt; in the default mode four selectors of four bits, of which bit 3 replicates the sign."""
    if mode is not None:
        selector = np.array(PERMUTE_MODES[mode], u4)[selector & u4(3)]
    both = (a.astype(u8) | (b.astype(u8) << u8(32))).view(u1).reshape(-1, 8)
    chosen = (selector[:, None] >> _NIBBLES) & u4(15)
    found = np.take_along_axis(both, (chosen & u4(7)).astype(np.intp), 1)
    if (signs := chosen >= 8).any():
        found = np.where(signs, np.where(found & u1(128), u1(255), u1(0)), found)
    return found.view(u4)[:, 0]


def leading_zeros(a):
    bits = 8 * a.dtype.itemsize
    x = a.astype(u8)
    for s in (1, 2, 4, 8, 16, 32):
        x = x | (x >> u8(s))
    return (bits - np.bitwise_count(x).astype(np.int64)).astype(u4)


def highest_bit(a, from_top: bool):
    """bfind: the position of the highest bit that differs from the sign, counted from either end;
    all ones where there is none."""
    bits = 8 * a.dtype.itemsize
    x = np.where(a < 0, ~a, a).view(_UNSIGNED[a.dtype.itemsize])
    zeros = leading_zeros(x)
    return np.where(x == 0, u4(0xFFFFFFFF), zeros if from_top else u4(bits - 1) - zeros)


def reverse_bits(a):
    a = np.ascontiguousarray(a)
    bits = np.unpackbits(a.view(u1).reshape(-1, a.dtype.itemsize), axis=1, bitorder="little")
    turned = np.packbits(np.ascontiguousarray(bits[:, ::-1]), axis=1, bitorder="little")
    return turned.view(a.dtype)[:, 0]


def bit_mask(first, count, clamp: bool):
    """bmsk: `count` ones from bit `first`."""
    if not clamp:
        first, count = first & u4(31), count & u4(31)
    first, count = np.broadcast_arrays(np.minimum(first, u4(32)), np.minimum(count, u4(32)))
    return (((u8(1) << count.astype(u8)) - u8(1)) << first.astype(u8)).astype(u4)


def extended(a, count, clamp: bool):
    """szext: the low `count` bits, extended to 32 by their sign if a is signed."""
    n = np.minimum(count, u4(32)) if clamp else count & u4(31)
    wide = np.int64 if a.dtype.kind == "i" else u8
    up = (u4(64) - n).astype(wide)
    return np.where(n == 0, 0, (a.astype(wide) << np.minimum(up, wide(63))) >> up).astype(a.dtype)
