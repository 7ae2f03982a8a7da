"""Every instruction against a model of one value at a time, written from the PTX manual.

Integers in all their widths: test_widths.py.

A row is PTX that leaves its result in %r9 and a function of one lane's inputs that gives it: of
unsigned %r1 and %r2 (INTEGERS) or of floats there (FLOATS). Elsewhere: tests of other files.
"""

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from fa3.emulator.lowering.registry import HANDLERS, TERMINATORS

from .ptx_runner import lanes

LANES = range(128)
RNG = np.random.default_rng(5)
EDGES = [0, 1, 2, 7, 31, 32, 33, 127, 128, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1]
X = np.array([*EDGES, *RNG.integers(0, 2**32, 128)][:128], np.uint32)
Y = np.array([*RNG.integers(1, 2**32, 96), *EDGES[1:], *EDGES[1:], *EDGES[1:]][:128], np.uint32)


def s(x: int, bits: int = 32) -> int:
    """Two's complement."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clamp(x, low, high):
    return min(max(x, low), high)


def half(x: int, i: int) -> int:
    return x >> 16 * i & 0xFFFF


def byte(x: int, i: int) -> int:
    return x >> 8 * i & 0xFF


def field(x: int, at: int, n: int, signed: bool) -> int:
    """bfe: bits beyond the top are copies of the sign, or zero."""
    at, n = at & 255, n & 255
    if n == 0:
        return 0
    wide = s(x) if signed else x
    bits = wide >> at & (1 << n) - 1
    return s(bits, n) if signed and at + n <= 32 else s(x) >> at if signed else bits


def insert(a: int, b: int, at: int, n: int) -> int:
    at, n = at & 255, min(n & 255, 32)
    mask = ((1 << n) - 1) << at
    return b & ~mask | a << at & mask


def first_bit(x: int) -> int:
    return x.bit_length() - 1 if x else 2**32 - 1


INTEGERS = {
    "add.s32 %r9, %r1, %r2;": lambda x, y: x + y,
    "sub.s32 %r9, %r1, %r2;": lambda x, y: x - y,
    "neg.s32 %r9, %r1;": lambda x, y: -x,
    "abs.s32 %r9, %r1;": lambda x, y: abs(s(x)),
    "mul.lo.s32 %r9, %r1, %r2;": lambda x, y: x * y,
    "mul.hi.s32 %r9, %r1, %r2;": lambda x, y: s(x) * s(y) >> 32,
    "mul.hi.u32 %r9, %r1, %r2;": lambda x, y: x * y >> 32,
    "mad.lo.u32 %r9, %r1, %r2, 3;": lambda x, y: x * y + 3,
    "mad.hi.u32 %r9, %r1, %r2, %r1;": lambda x, y: (x * y >> 32) + x,
    "div.s32 %r9, %r1, %r2;": lambda x, y: quotient(s(x), s(y)),
    "div.u32 %r9, %r1, %r2;": lambda x, y: x // y,
    "rem.s32 %r9, %r1, %r2;": lambda x, y: s(x) - quotient(s(x), s(y)) * s(y),
    "rem.u32 %r9, %r1, %r2;": lambda x, y: x % y,
    "min.s32 %r9, %r1, %r2;": lambda x, y: min(s(x), s(y)),
    "min.u32 %r9, %r1, %r2;": min,
    "max.s32 %r9, %r1, %r2;": lambda x, y: max(s(x), s(y)),
    "max.u32 %r9, %r1, %r2;": max,
    "and.b32 %r9, %r1, %r2;": lambda x, y: x & y,
    "or.b32 %r9, %r1, %r2;": lambda x, y: x | y,
    "xor.b32 %r9, %r1, %r2;": lambda x, y: x ^ y,
    "not.b32 %r9, %r1;": lambda x, y: ~x,
    "shl.b32 %r9, %r1, %r2;": lambda x, y: x << min(y, 32),
    "shr.u32 %r9, %r1, %r2;": lambda x, y: x >> min(y, 32),
    "shr.s32 %r9, %r1, %r2;": lambda x, y: s(x) >> min(y, 31),
    "shf.l.wrap.b32 %r9, %r1, %r2, %r2;": lambda x, y: (y << 32 | x) << y % 32 >> 32,
    "shf.l.clamp.b32 %r9, %r1, %r2, %r2;": lambda x, y: (y << 32 | x) << min(y, 32) >> 32,
    "shf.r.wrap.b32 %r9, %r1, %r2, %r2;": lambda x, y: (y << 32 | x) >> y % 32,
    "shf.r.clamp.b32 %r9, %r1, %r2, %r2;": lambda x, y: (y << 32 | x) >> min(y, 32),
    "bfe.u32 %r9, %r1, 5, 9;": lambda x, y: field(x, 5, 9, False),
    "bfe.s32 %r9, %r1, 5, 9;": lambda x, y: field(x, 5, 9, True),
    "bfe.s32 %r9, %r1, 28, 9;": lambda x, y: field(x, 28, 9, True),
    "bfi.b32 %r9, %r1, %r2, 7, 11;": lambda x, y: insert(x, y, 7, 11),
    "lop3.b32 %r9, %r1, %r2, 0x0F0F0F0F, 0xE8;": lambda x, y: (
        x & y | x & 0x0F0F0F0F | y & 0x0F0F0F0F
    ),
    "prmt.b32 %r9, %r1, %r2, 0x7520;": lambda x, y: (
        byte(x, 0) | byte(x, 2) << 8 | byte(y, 1) << 16 | byte(y, 3) << 24
    ),
    "popc.b32 %r9, %r1;": lambda x, y: x.bit_count(),
    "clz.b32 %r9, %r1;": lambda x, y: 32 - x.bit_length(),
    "bfind.u32 %r9, %r1;": lambda x, y: first_bit(x),
    "bfind.shiftamt.u32 %r9, %r1;": lambda x, y: 31 - first_bit(x) if x else -1,
    "brev.b32 %r9, %r1;": lambda x, y: int(f"{x:032b}"[::-1], 2),
    "dp4a.u32.u32 %r9, %r1, %r2, 5;": lambda x, y: (
        sum(byte(x, i) * byte(y, i) for i in range(4)) + 5
    ),
    "dp4a.s32.s32 %r9, %r1, %r2, -5;": lambda x, y: (
        sum(s(byte(x, i), 8) * s(byte(y, i), 8) for i in range(4)) - 5
    ),
    "dp2a.lo.s32.s32 %r9, %r1, %r2, 0;": lambda x, y: sum(
        s(half(x, i), 16) * s(byte(y, i), 8) for i in range(2)
    ),
    "dp2a.hi.u32.u32 %r9, %r1, %r2, 0;": lambda x, y: sum(
        half(x, i) * byte(y, i + 2) for i in range(2)
    ),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, %r1, %r2, %p1;": lambda x, y: x if s(x) < s(y) else y,
    "setp.hi.u32 %p1|%p2, %r1, %r2; selp.b32 %r9, 1, 2, %p2;": lambda x, y: 2 if x > y else 1,
    "slct.b32.s32 %r9, %r1, %r2, %r1;": lambda x, y: x if s(x) >= 0 else y,
    "set.le.u32.s32 %r9, %r1, %r2;": lambda x, y: -1 if s(x) <= s(y) else 0,
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};": lambda x, y: (
        half(x, 0) << 16 | x >> 16
    ),
    "mov.b64 %rd1, {%r1, %r2}; mov.b64 {%r3, %r9}, %rd1;": lambda x, y: y,
    "cvt.u32.u8 %r9, %r1;": lambda x, y: byte(x, 0),
    "cvt.s32.s8 %r9, %r1;": lambda x, y: s(x, 8),
    "cvt.s32.s16 %r9, %r1;": lambda x, y: s(x, 16),
    "cvt.sat.u8.s32 %r9, %r1;": lambda x, y: clamp(s(x), 0, 255),
    "cvt.sat.s16.s32 %r9, %r1;": lambda x, y: clamp(s(x), -(2**15), 2**15 - 1),
    "cvt.u64.u32 %rd1, %r1; shl.b64 %rd1, %rd1, 4; cvt.u32.u64 %r9, %rd1;": lambda x, y: x << 4,
    "mul.wide.u32 %rd1, %r1, %r2; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r9, %rd1;": lambda x, y: (
        x * y >> 32
    ),
    "mad.wide.s32 %rd1, %r1, %r2, 7; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r9, %rd1;": lambda x, y: (
        s(x) * s(y) + 7 >> 32
    ),
}


@pytest.mark.parametrize("code", INTEGERS)
def test_integers(code):
    model = INTEGERS[code]
    expected = [model(x, y) & 0xFFFFFFFF for x, y in zip(X.tolist(), Y.tolist(), strict=True)]
    assert lanes(code, inputs=(X, Y)).tolist() == expected


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1.5, 3e38, -3e38, math.inf, -math.inf, math.nan]
F = np.array([*SPECIAL, *RNG.standard_normal(128) * 8][:128], np.float32)
G = np.array([*SPECIAL[::-1], *RNG.standard_normal(128)][:128], np.float32)


def f32(x: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float32(x))


def lesser(x, y):
    """min: NaN only of two NaNs; -0 is less than 0."""
    if math.isnan(x) or math.isnan(y):
        return y if math.isnan(x) else x
    return min(x, y, key=lambda v: (v, math.copysign(1, v)))


def log2(x):
    return math.nan if x < 0 else math.log2(x) if x else -math.inf


def inverse(x):
    return math.copysign(math.inf, x) if x == 0 else 1 / x


def to_integer(x, low=-(2**31), high=2**31 - 1):
    return 0 if math.isnan(x) else clamp(x, low, high)


def rounded(f):
    return lambda x, y: int(to_integer(x if math.isinf(x) or math.isnan(x) else f(x))) & 0xFFFFFFFF


def f16(x: float) -> int:
    with np.errstate(all="ignore"):
        return int(np.float16(x).view(np.uint16)) if not math.isnan(x) else 0x7FFF


EXACT = {
    "add.f32 %r9, %r1, %r2;": lambda x, y: f32(x + y),
    "sub.f32 %r9, %r1, %r2;": lambda x, y: f32(x - y),
    "mul.f32 %r9, %r1, %r2;": lambda x, y: f32(x * y),
    "fma.rn.f32 %r9, %r1, %r2, %r2;": lambda x, y: f32(x * y + y),
    "mad.rn.f32 %r9, %r1, %r2, %r1;": lambda x, y: f32(x * y + x),
    "neg.f32 %r9, %r1;": lambda x, y: -x,
    "abs.f32 %r9, %r1;": lambda x, y: abs(x),
    "copysign.f32 %r9, %r1, %r2;": lambda x, y: math.copysign(y, x),
    "min.f32 %r9, %r1, %r2;": lesser,
    "max.f32 %r9, %r1, %r2;": lambda x, y: -lesser(-x, -y),
    "max.NaN.f32 %r9, %r1, %r2;": lambda x, y: math.nan if x != x or y != y else -lesser(-x, -y),
    "add.sat.f32 %r9, %r1, %r2;": lambda x, y: clamp(f32(x + y), 0, 1) if x + y == x + y else 0,
    "setp.gtu.f32 %p1, %r1, %r2; selp.f32 %r9, %r1, %r2, %p1;": lambda x, y: y if x <= y else x,
    "setp.ne.f32 %p1, %r1, %r2; selp.f32 %r9, 0f3F800000, 0f00000000, %p1;": lambda x, y: float(
        x < y or x > y
    ),
    "cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r9, %rs1;": lambda x, y: (
        math.nan if math.isnan(x) else float(np.array(f16(x), np.uint16).view(np.float16))
    ),
    "cvt.rmi.f32.f32 %r9, %r1;": lambda x, y: float(np.floor(x)),
}
# of each approximation: model, operands, and the bound on its error that the manual states
ULP, RELATIVE, ABSOLUTE = "ulp", "relative", "absolute"
TINY, HUGE = 2.0**-126, 2.0**126
EVERYWHERE = TINY * 2.0**-10, 2.0**127
APPROXIMATE = {
    "div.full.f32 %r9, %r1, %r2;": (lambda x, y: x / y, (2.0**-60, 2.0**60), ULP, 2),
    "div.approx.f32 %r9, %r1, %r2;": (lambda x, y: x / y, (2.0**-60, 2.0**60), ULP, 2),
    "rcp.approx.f32 %r9, %r1;": (lambda x, y: 1 / x, (TINY, HUGE), ULP, 1),
    "rcp.approx.ftz.f32 %r9, %r1;": (lambda x, y: 1 / x, (TINY, HUGE), ULP, 1),
    "sqrt.approx.f32 %r9, %r1;": (lambda x, y: math.sqrt(x), EVERYWHERE, RELATIVE, 2**-23),
    "rsqrt.approx.f32 %r9, %r1;": (
        lambda x, y: 1 / math.sqrt(x),
        EVERYWHERE,
        RELATIVE,
        2**-22.9,
    ),
    "lg2.approx.f32 %r9, %r1;": (lambda x, y: math.log2(x), (0.5, 2), ABSOLUTE, 2**-22),
    "lg2.approx.ftz.f32 %r9, %r1;": (lambda x, y: math.log2(x), (2, HUGE), RELATIVE, 2**-22),
    "ex2.approx.f32 %r9, %r1;": (lambda x, y: 2.0**x, (2.0**-20, 127), ULP, 2),
    "neg.f32 %r1, %r1; ex2.approx.ftz.f32 %r9, %r1;": (
        lambda x, y: 2.0**-x,
        (2.0**-20, 125),
        ULP,
        2,
    ),
    "tanh.approx.f32 %r9, %r1;": (lambda x, y: math.tanh(x), EVERYWHERE, RELATIVE, 2**-11),
    "sin.approx.f32 %r9, %r1;": (
        lambda x, y: math.sin(x),
        (2.0**-20, 2 * math.pi),
        ABSOLUTE,
        2**-20.5,
    ),
    "cos.approx.ftz.f32 %r9, %r1;": (
        lambda x, y: math.cos(x),
        (2.0**-20, 2 * math.pi),
        ABSOLUTE,
        2**-20.5,
    ),
}
BITS = {
    "cvt.rni.s32.f32 %r9, %r1;": rounded(round),
    "cvt.rzi.s32.f32 %r9, %r1;": rounded(math.trunc),
    "cvt.rmi.s32.f32 %r9, %r1;": rounded(math.floor),
    "cvt.rpi.s32.f32 %r9, %r1;": rounded(math.ceil),
    "cvt.rn.f16x2.f32 %r9, %r1, %r2;": lambda x, y: f16(x) << 16 | f16(y),
    "cvt.rn.bf16x2.f32 %r9, %r1, %r2;": lambda x, y: bf16(x) << 16 | bf16(y),
}


def bf16(x: float) -> int:
    """To nearest even."""
    if math.isnan(x):
        return 0x7FFF
    bits = struct.unpack("I", struct.pack("f", x))[0]
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def pairs(model):
    values = zip(F.tolist(), G.tolist(), strict=True)
    return np.array([model(x, y) for x, y in values])


@pytest.mark.parametrize("code", EXACT)
def test_floats(code):
    found = lanes(code, inputs=(F, G)).view(np.float32)
    np.testing.assert_array_equal(found, pairs(EXACT[code]).astype(np.float32))
    signs = np.signbit(found) == np.signbit(pairs(EXACT[code]))
    assert (signs | np.isnan(found) | ("sat" in code)).all(), "zeros keep their sign"


@pytest.mark.parametrize("code", APPROXIMATE)
def test_approximations_stay_within_the_error_of_the_manual(code):
    model, (low, high), measure, bound = APPROXIMATE[code]
    x = 2.0 ** RNG.uniform(math.log2(low), math.log2(high), 128)
    x, y = x.astype(np.float32), (2.0 ** RNG.uniform(-60, 60, 128)).astype(np.float32)
    found = lanes(code, inputs=(x, y)).view(np.float32).astype(float)
    expected = np.array([model(*v) for v in zip(x.tolist(), y.tolist(), strict=True)])
    error = np.abs(found - expected)
    if measure == ULP:
        error /= np.spacing(np.abs(expected).astype(np.float32))
    elif measure == RELATIVE:
        error /= np.abs(expected)
    assert error.max() <= bound


# of the special values of the tables of the manual, in this order
CORNERS = np.array([-math.inf, -1.5, -0.0, 0.0, math.inf, math.nan], np.float32)
NAN, INF = math.nan, math.inf
AT_CORNERS = {
    "rcp.approx.f32 %r9, %r1;": [-0.0, -1 / 1.5, -INF, INF, 0.0, NAN],
    "sqrt.approx.f32 %r9, %r1;": [NAN, NAN, -0.0, 0.0, INF, NAN],
    "rsqrt.approx.f32 %r9, %r1;": [NAN, NAN, -INF, INF, 0.0, NAN],
    "lg2.approx.f32 %r9, %r1;": [NAN, NAN, -INF, -INF, INF, NAN],
    "ex2.approx.f32 %r9, %r1;": [0.0, 2**-1.5, 1.0, 1.0, INF, NAN],
    "tanh.approx.f32 %r9, %r1;": [-1.0, math.tanh(-1.5), -0.0, 0.0, 1.0, NAN],
    "sin.approx.f32 %r9, %r1;": [NAN, math.sin(-1.5), -0.0, 0.0, NAN, NAN],
    "cos.approx.f32 %r9, %r1;": [NAN, math.cos(-1.5), 1.0, 1.0, NAN, NAN],
}


@pytest.mark.parametrize("code", AT_CORNERS)
def test_approximations_of_special_values(code):
    found = lanes(code, inputs=(CORNERS,)).view(np.float32)[: len(CORNERS)]
    np.testing.assert_allclose(found, AT_CORNERS[code], rtol=2**-22)
    expected = np.array(AT_CORNERS[code])
    assert (np.signbit(found) == np.signbit(expected))[~np.isnan(expected)].all()


SMALL = np.float32(2.0**-127)  # subnormal
LEAST = np.float32(2.0**-126)  # normal
# with .ftz: %r1, %r2, and what an instruction makes of them, the signs of zeros included
FLUSHED = [
    ("add.ftz.f32 %r9, %r1, %r2;", -SMALL, SMALL, 0.0),
    ("add.ftz.f32 %r9, %r1, %r2;", -SMALL, -0.0, -0.0),
    ("add.rn.ftz.f32 %r9, %r1, %r2;", LEAST, -1.5 * LEAST, -0.0),
    ("add.f32 %r9, %r1, %r2;", LEAST, -1.5 * LEAST, -SMALL),
    ("sub.ftz.f32 %r9, %r1, %r2;", LEAST, SMALL, LEAST),
    ("mul.ftz.f32 %r9, %r1, %r2;", LEAST, -0.5, -0.0),
    ("mul.ftz.f32 %r9, %r1, %r2;", SMALL, -4.0, -0.0),
    ("mul.ftz.sat.f32 %r9, %r1, %r2;", SMALL, 4.0, 0.0),
    ("fma.rn.ftz.f32 %r9, %r1, %r2, %r1;", SMALL, 8.0, 0.0),
    ("fma.rn.ftz.f32 %r9, %r1, %r2, %r2;", -0.25, LEAST, 0.0),
    ("fma.rn.f32 %r9, %r1, %r2, %r2;", -0.5, LEAST, SMALL),
    ("fma.rn.sat.f32 %r9, %r1, %r2, %r2;", 4.0, 2.0, 1.0),
    ("mad.rn.ftz.f32 %r9, %r1, %r2, %r1;", -SMALL, 8.0, -0.0),
    ("div.rn.ftz.f32 %r9, %r1, %r2;", -LEAST, 2.0, -0.0),
    ("div.full.ftz.f32 %r9, %r1, %r2;", 1.0, -SMALL, -INF),
    ("abs.ftz.f32 %r9, %r1;", -SMALL, 0.0, 0.0),
    ("neg.ftz.f32 %r9, %r1;", SMALL, 0.0, -0.0),
    ("neg.f32 %r9, %r1;", SMALL, 0.0, -SMALL),
    ("min.ftz.f32 %r9, %r1, %r2;", SMALL, 1.0, 0.0),
    ("max.ftz.f32 %r9, %r1, %r2;", -SMALL, -1.0, -0.0),
    ("max.NaN.ftz.f32 %r9, %r1, %r2;", -SMALL, -1.0, -0.0),
    ("rcp.approx.ftz.f32 %r9, %r1;", -SMALL, 0.0, -INF),
    ("rcp.approx.ftz.f32 %r9, %r1;", -(2.0**127), 0.0, -0.0),
    ("rcp.approx.f32 %r9, %r1;", 2.0**127, 0.0, SMALL),
    ("rcp.rn.ftz.f32 %r9, %r1;", SMALL, 0.0, INF),
    ("sqrt.approx.ftz.f32 %r9, %r1;", -SMALL, 0.0, -0.0),
    ("sqrt.rn.ftz.f32 %r9, %r1;", SMALL, 0.0, 0.0),
    ("rsqrt.approx.ftz.f32 %r9, %r1;", -SMALL, 0.0, -INF),
    ("lg2.approx.ftz.f32 %r9, %r1;", SMALL, 0.0, -INF),
    ("lg2.approx.f32 %r9, %r1;", SMALL, 0.0, -127.0),
    ("ex2.approx.ftz.f32 %r9, %r1;", -127.0, 0.0, 0.0),
    ("ex2.approx.f32 %r9, %r1;", -127.0, 0.0, SMALL),
    ("ex2.approx.ftz.f32 %r9, %r1;", -SMALL, 0.0, 1.0),
    ("sin.approx.ftz.f32 %r9, %r1;", -SMALL, 0.0, -0.0),
    ("cos.approx.ftz.f32 %r9, %r1;", SMALL, 0.0, 1.0),
    ("tanh.approx.f32 %r9, %r1;", SMALL, 0.0, SMALL),
    ("setp.gt.ftz.f32 %p1, %r1, %r2; selp.f32 %r9, 0f3F800000, %r2, %p1;", SMALL, 0.0, 0.0),
    ("setp.ne.ftz.f32 %p1|%p2, %r1, %r2; selp.f32 %r9, %r1, %r2, %p2;", SMALL, -SMALL, SMALL),
    ("set.lt.ftz.f32.f32 %r9, %r2, %r1;", SMALL, 0.0, 0.0),
    ("slct.ftz.f32.f32 %r9, %r2, 0f00000000, %r1;", -SMALL, 5.0, 5.0),
    ("cvt.ftz.f32.f32 %r9, %r1;", -SMALL, 0.0, -0.0),
    ("cvt.rpi.ftz.f32.f32 %r9, %r1;", SMALL, 0.0, 0.0),
    ("cvt.rpi.ftz.s32.f32 %r9, %r1;", SMALL, 0.0, 0.0),
    ("cvt.f64.f32 %fd1, %r1; cvt.rn.ftz.f32.f64 %r9, %fd1;", SMALL, 0.0, 0.0),
    ("cvt.ftz.f64.f32 %fd1, %r1; cvt.rn.f32.f64 %r9, %fd1;", SMALL, 0.0, 0.0),
]


@pytest.mark.parametrize("code, x, y, expected", FLUSHED)
def test_subnormal_values_and_ftz(code, x, y, expected):
    """Bundled and one by one, guarded and not."""
    x, y, expected = (np.full(128, v, np.float32) for v in (x, y, expected))
    several = code.replace("%r9", "%r20") + code.replace("%r9", "%r30")
    for body in (code, f"@%p8 mov.b32 %r9, 0; {code}", several * 2 + code):
        found = lanes("setp.ne.u32 %p8, %r0, %r0;" + body, inputs=(x, y))
        assert found.tolist() == expected.view(np.uint32).tolist()


@pytest.mark.parametrize("code, x, expected", [
    ("add.ftz.f16x2 %r9, %r1, %r2;", 2.0**-15, 0.0),
    ("add.f16x2 %r9, %r1, %r2;", 2.0**-15, 2.0**-15),
    ("fma.rn.ftz.f16x2 %r9, %r1, %r1, %r2;", -(2.0**-15), 0.0),
    ("max.ftz.f16x2 %r9, %r1, %r1;", -(2.0**-15), -0.0),
])  # fmt: skip
def test_subnormal_halves(code, x, expected):
    pair, zero = (np.full((128, 2), v, np.float16).view(np.uint32).ravel() for v in (x, -0.0))
    wanted = np.full((128, 2), expected, np.float16).view(np.uint32).ravel()
    assert lanes(code, inputs=(pair, zero)).tolist() == wanted.tolist()


@pytest.mark.parametrize("code", BITS)
def test_conversions(code):
    assert lanes(code, inputs=(F, G)).tolist() == pairs(BITS[code]).tolist()


def packed(a, kind):
    if kind == "f16":
        return a.astype(np.float16).view(np.uint32).ravel()
    upper = np.array([bf16(float(v)) for v in a.ravel()], np.uint32).reshape(-1, 2)
    return upper[:, 0] | upper[:, 1] << 16


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "max", "min", "neg", "abs", "fma.rn"])
def test_packed_halves(op, kind):
    """Sums and products of small integers, which both types hold exactly."""
    a, b = RNG.integers(-8, 9, (2, 128, 2)).astype(np.float32)
    operands = {"neg": "%r1", "abs": "%r1", "fma.rn": "%r1, %r2, %r1"}.get(op, "%r1, %r2")
    found = lanes(f"{op}.{kind}x2 %r9, {operands};", inputs=(packed(a, kind), packed(b, kind)))
    models = {
        "add": a + b, "sub": a - b, "mul": a * b, "max": np.maximum(a, b), "neg": -a,
        "min": np.minimum(a, b), "abs": np.abs(a), "fma.rn": a * b + a,
    }  # fmt: skip
    expected = packed(models[op], kind)
    both = np.stack([found, expected], 1).view(np.uint16) & 0x7FFF  # a zero of either sign
    zero = (both.reshape(-1, 2, 2) == 0).all(1)
    same = found.view(np.uint16).reshape(-1, 2) == expected.view(np.uint16).reshape(-1, 2)
    assert (same | zero).all()


def warp(i):
    return range(i // 32 * 32, i // 32 * 32 + 32)


def reduce(f):
    def model(i, x):
        total = x[i // 32 * 32]
        for j in warp(i)[1:]:
            total = f(total, x[j])
        return total

    return model


# of lane i and the values of all lanes of %r1
WARPS = {
    "shfl.sync.idx.b32 %r9, %r1, 5, 31, -1;": lambda i, x: x[i // 32 * 32 + 5],
    "shfl.sync.up.b32 %r9, %r1, 3, 0, -1;": lambda i, x: x[i - 3 if i % 32 >= 3 else i],
    "shfl.sync.down.b32 %r9, %r1, 3, 31, -1;": lambda i, x: x[i + 3 if i % 32 < 29 else i],
    "shfl.sync.bfly.b32 %r9, %r1, 2, 7199, -1;": lambda i, x: x[i ^ 2],
    "shfl.sync.down.b32 %r9|%p1, %r1, 9, 31, -1; selp.b32 %r9, 1, 0, %p1;": lambda i, x: int(
        i % 32 < 23
    ),
    "and.b32 %r3, %r1, 1; setp.ne.b32 %p1, %r3, 0; vote.sync.ballot.b32 %r9, %p1, -1;": (
        lambda i, x: sum((x[j] & 1) << k for k, j in enumerate(warp(i)))
    ),
    "setp.gt.s32 %p1, %r0, 40; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;": (
        lambda i, x: int(i >= 32)
    ),
    "setp.gt.s32 %p1, %r0, 40; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;": (
        lambda i, x: int(i >= 64)
    ),
    "activemask.b32 %r9;": lambda i, x: 0xFFFFFFFF,
    "and.b32 %r3, %r1, 3; match.any.sync.b32 %r9, %r3, -1;": lambda i, x: sum(
        int(x[j] & 3 == x[i] & 3) << k for k, j in enumerate(warp(i))
    ),
    "redux.sync.add.u32 %r9, %r1, -1;": reduce(lambda a, b: a + b & 0xFFFFFFFF),
    "redux.sync.min.u32 %r9, %r1, -1;": reduce(min),
    "redux.sync.max.s32 %r9, %r1, -1;": reduce(lambda a, b: a if s(a) > s(b) else b),
    "redux.sync.and.b32 %r9, %r1, -1;": reduce(lambda a, b: a & b),
    "redux.sync.or.b32 %r9, %r1, -1;": reduce(lambda a, b: a | b),
    "redux.sync.xor.b32 %r9, %r1, -1;": reduce(lambda a, b: a ^ b),
    "elect.sync %r9|%p1, -1; @%p1 mov.b32 %r9, 99;": lambda i, x: 99 if i % 32 == 0 else 0,
}


@pytest.mark.parametrize("code", WARPS)
def test_warps(code):
    values = X.tolist()
    assert lanes(code, inputs=(X,)).tolist() == [WARPS[code](i, values) for i in LANES]


GENERIC = "mov.u32 %r3, buffer; cvt.u64.u32 %rd1, %r3; cvta.shared.u64 %rd2, %rd1;"
OWN = "shl.b32 %r3, %r0, 2; st.shared.b32 [%r3], %r1;"
# of %r1: memory and addresses
MEMORY = {
    OWN + "ld.shared.b32 %r9, [%r3];": lambda x: x,
    OWN + "ld.shared.u8 %r9, [%r3+1];": lambda x: byte(x, 1),
    OWN + "ld.shared.s8 %r9, [%r3+3];": lambda x: s(x >> 24, 8),
    "ldu.global.b32 %r9, [%rd8+512];": lambda x: x,
    GENERIC + "isspacep.shared %p1, %rd2; selp.b32 %r9, 1, 0, %p1;": lambda x: 1,
    GENERIC + "cvta.to.shared.u64 %rd3, %rd2; cvt.u32.u64 %r9, %rd3;": lambda x: 0,
    GENERIC + "isspacep.global %p1, %rd2; selp.b32 %r9, 1, 0, %p1;": lambda x: 0,
    "mov.u32 %r3, buffer; getctarank.shared::cluster.u32 %r9, %r3;": lambda x: 0,
    OWN + "mapa.shared::cluster.u32 %r4, %r3, 0; ld.shared::cluster.b32 %r9, [%r4];": lambda x: x,
}


@pytest.mark.parametrize("code", MEMORY)
def test_memory(code):
    assert lanes(code, inputs=(X,)).tolist() == [MEMORY[code](x) & 0xFFFFFFFF for x in X.tolist()]


def run_atomics(op, kind, start, values):
    """(results in memory, old values) of one word that all lanes change in order."""
    code = f"""mov.u32 %r3, buffer; setp.eq.u32 %p1, %r0, 0;
        @%p1 st.shared.b32 [%r3], {start}; bar.sync 0;
        atom.shared.{op}.{kind} %r8, [%r3], %r1; bar.sync 0; ld.shared.b32 %r9, [%r3];"""
    return int(lanes(code, inputs=(values,))[0])


ATOMICS = {
    ("add", "u32"): lambda a, b: a + b & 0xFFFFFFFF,
    ("min", "s32"): lambda a, b: a if s(a) < s(b) else b,
    ("max", "u32"): max,
    ("and", "b32"): lambda a, b: a & b,
    ("or", "b32"): lambda a, b: a | b,
    ("xor", "b32"): lambda a, b: a ^ b,
    ("exch", "b32"): lambda a, b: b,
    ("inc", "u32"): lambda a, b: 0 if a >= b else a + 1,
    ("dec", "u32"): lambda a, b: b if a == 0 or a > b else a - 1,
}


@pytest.mark.parametrize("op, kind", ATOMICS)
def test_atomics(op, kind):
    expected = 77
    for x in Y.tolist():
        expected = ATOMICS[op, kind](expected, x)
    assert run_atomics(op, kind, 77, Y) == expected


# what has no effect on results: %r9 stays
NOTHING = """membar.gl; prefetch.global.L2 [%rd0]; prefetchu.L1 [%rd0]; griddepcontrol.wait;
    applypriority.global.L2::evict_normal [%rd0], 128; pmevent 1; discard.global.L2 [%rd0], 128;
    createpolicy.fractional.L2::evict_last.b64 %rd1, 0f3F800000; brkpt; nanosleep.u32 20;"""


@pytest.mark.parametrize("code", [x.strip() + ";" for x in NOTHING.split(";") if x.strip()])
def test_hints_change_nothing(code):
    assert lanes(f"mov.b32 %r9, %r1; {code}", inputs=(X,)).tolist() == X.tolist()


@pytest.mark.parametrize("leave", ["@%p1 exit;", "@%p1 ret;"])
def test_lanes_leave(leave):
    code = f"st.global.b32 [%rd8], %r1; setp.lt.u32 %p1, %r0, 40; {leave} neg.s32 %r9, %r1;"
    expected = [x if i < 40 else -x & 0xFFFFFFFF for i, x in enumerate(X.tolist())]
    assert lanes(code, inputs=(X,)).tolist() == expected


def test_tensor_maps_are_edited_in_shared_memory():
    """The address is at byte 0, dimension 1 (minus 1) at 36, stride 1 (of 16 bytes) at 16."""
    code = """mov.u32 %r3, buffer; shl.b32 %r4, %r0, 2; add.u32 %r5, %r3, %r4; mov.b32 %r6, 0;
        st.shared.b32 [%r5], %r6; bar.sync 0; setp.eq.u32 %p1, %r0, 0; mov.b64 %rd1, 4660;
        @%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r3], %rd1;
        @%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r3], 1, 100;
        @%p1 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r3], 1, 256;
        bar.sync 0; ld.shared.b32 %r9, [%r5];"""
    words = lanes(code, threads=32).tolist()
    assert (words[0], words[9], words[4]) == (4660, 99, 16)
    assert sum(x != 0 for x in words) == 3


# instructions that are tested with what they belong to: file, test
ELSEWHERE = {
    "bar": ("test_instructions.py", "test_shared_memory_and_barrier"),
    "barrier": ("test_instructions.py", "test_remote_shared_memory"),
    "bra": ("test_instructions.py", "test_divergent_loop_reconverges"),
    "call": ("test_calls.py", "test_printf_prints_what_c_prints"),
    "cp": ("test_races.py", "test_the_kernel_without_the_race_passes"),
    "fence": ("test_bugs.py", "test_a_bug_is_found"),
    "ldmatrix": ("test_matrix.py", "test_ldmatrix"),
    "mbarrier": ("test_memory.py", "test_waiting_threads_see_what_was_written_before_the_arrivals"),
    "mma": ("test_matrix.py", "test_mma_m16n8k16"),
    "red": ("test_instructions.py", "test_atomics"),
    "setmaxnreg": ("test_bugs.py", "test_a_bug_is_found"),
    "stmatrix": ("test_bytes.py", "test_stmatrix_is_the_inverse_of_ldmatrix"),
    "trap": ("test_instructions.py", "test_errors_name_the_instruction"),
    **dict.fromkeys(
        ("bmsk", "cnot", "mad24", "mul24", "sad", "szext"), ("test_widths.py", "test_integers")
    ),
    "wgmma": ("test_wgmma.py", "test_the_short_accumulator_is_bit_for_bit_the_model"),
}


def test_every_instruction_has_a_test():
    here = Path(__file__).read_text(encoding="utf-8")
    missing = []
    for opcode in sorted({*HANDLERS, *TERMINATORS}):
        name, test = ELSEWHERE.get(opcode, ("test_manual.py", ""))
        text = Path(__file__).with_name(name).read_text(encoding="utf-8") if test else here
        used = any(f"{lead}{opcode}{end}" in text for lead in ' "};\n' for end in '. ;"')
        if not used or test not in text:
            missing.append(opcode)
    assert not missing, f"no unit test of {missing}"
