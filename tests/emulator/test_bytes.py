"""Instructions an FP8 kernel moves and converts bytes with, against models of single values."""

import math
from fractions import Fraction

import numpy as np
import pytest

from .ptx_runner import lanes, launch
from .test_wgmma import FP8, NAN, value

RNG = np.random.default_rng(0)
LARGEST = {"e4m3": 0x7E, "e5m2": 0x7B}
u4 = np.uint32
X = RNG.integers(0, 2**32, 128, dtype=u4)
Y = RNG.integers(0, 2**32, 128, dtype=u4)


def nearest(x: float, kind: str) -> int:
    """The code of cvt.rn.satfinite: of two equally near the even one."""
    if math.isnan(x):
        return 0x7F
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    if math.isinf(x):
        return sign | LARGEST[kind]
    codes = range(LARGEST[kind] + 1)
    return sign | min(codes, key=lambda c: (abs(value(c, kind) - abs(Fraction(x))), c & 1))


def floats(kind: str) -> np.ndarray:
    """128 floats: specials, ties, the ends of the range, subnormals of the type, random ones."""
    top, tiny = float(value(LARGEST[kind], kind)), float(value(1, kind))
    some = [0.0, 1.0, top, top * 1.03, top * 1.07, 3e38, math.inf, tiny, tiny / 2, tiny / 2.1]
    ties = [float(value(c, kind) + value(c + 1, kind)) / 2 for c in (0, 1, 2, 3, 7, 8, 40, 41, 100)]
    given = [s * x for x in some + ties + [1e-40] for s in (1, -1)] + [math.nan, -math.nan]
    spread = RNG.standard_normal(128) * 2.0 ** RNG.integers(-12, 12, 128)
    return np.concatenate([given, spread])[:128].astype(np.float32)


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("kind", FP8)
def test_floats_to_fp8(kind, relu):
    x = floats(kind)
    code = f"cvt.rn.satfinite{relu}.{kind}x2.f32 %rs1, %r1, %r2; cvt.u32.u16 %r9, %rs1;"
    found = lanes(code, inputs=(x, x[::-1].copy()))
    expected = [nearest(0.0 if relu and v < 0 else v, kind) for v in x.tolist()]
    if relu:
        expected = [c & 0x7F for c in expected]
    assert (found >> u4(8)).tolist() == expected, "the first source goes to the upper half"
    assert (found & u4(0xFF)).tolist() == expected[::-1]


@pytest.mark.parametrize("kind", FP8)
def test_halves_to_fp8_and_back(kind):
    codes = np.arange(256, dtype=u4)
    pairs = (codes[::2] | codes[1::2] << u4(8)).astype(u4)
    to_halves = f"cvt.u16.u32 %rs1, %r1; cvt.rn.f16x2.{kind}x2 %r9, %rs1;"
    halves = lanes(to_halves, inputs=(pairs,)).view(np.float16)
    nan = np.isin(codes, NAN[kind])
    signs = np.where(codes & 0x80, -1, 1)
    magnitudes = [
        math.nan if n else float(abs(value(int(c), kind))) for c, n in zip(codes, nan, strict=True)
    ]
    expected = (signs * magnitudes).tolist()
    if kind == "e5m2":
        expected[0x7C], expected[0xFC] = math.inf, -math.inf
    np.testing.assert_array_equal(halves, np.array(expected, np.float16))
    back = f"cvt.rn.satfinite.{kind}x2.f16x2 %rs1, %r1; cvt.u32.u16 %r9, %rs1;"
    again = lanes(back, inputs=(halves.view(u4),))
    assert again.astype(np.uint16).view(np.uint8).tolist() == [nearest(v, kind) for v in expected]


PRMT = {  # mode -> bytes of the result, lowest first, by the two low bits of the selector
    "f4e": ("0123", "1234", "2345", "3456"),
    "b4e": ("0765", "1076", "2107", "3210"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("0123", "1123", "2223", "3333"),
    "ecr": ("0000", "0111", "0122", "0123"),
    "rc16": ("0101", "2323", "0101", "2323"),
}


def permuted(a: int, b: int, choices) -> int:
    pool = [*int(a).to_bytes(4, "little"), *int(b).to_bytes(4, "little")]
    return int.from_bytes(bytes(pool[int(c)] for c in choices), "little")


@pytest.mark.parametrize("mode", PRMT)
def test_permute_modes(mode):
    found = lanes(f"prmt.b32.{mode} %r9, %r1, %r2, %r0;", inputs=(X, Y))
    expected = [
        permuted(a, b, PRMT[mode][i & 3]) for i, (a, b) in enumerate(zip(X, Y, strict=True))
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("selector", ["6420", "7531", "5140", "7362"])
def test_permutations_of_a_byte_transpose(selector):
    found = lanes(f"prmt.b32 %r9, %r1, %r2, 0x{selector};", inputs=(X, Y))
    assert found.tolist() == [permuted(a, b, selector[::-1]) for a, b in zip(X, Y, strict=True)]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(trans):
    """Lane 4 g + q gives elements 2 q, 2 q + 1 of row g (transposed: of column g)."""
    words = RNG.integers(0, 2**32, (32, 4), dtype=u4)
    array = words.copy()
    launch(
        f"""mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %rd0, %rd1;
        mov.u32 %r1, buffer; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2;
        ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, [%rd2];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3], {{%r4,%r5,%r6,%r7}};
        bar.sync 0;
        ld.shared.v4.b32 {{%r4,%r5,%r6,%r7}}, [%r3];
        st.global.v4.b32 [%rd2], {{%r4,%r5,%r6,%r7}};""",
        array,
        threads=32,
    )
    fragments = words.view(np.uint16).reshape(8, 4, 4, 2)  # g, q, matrix, element
    matrices = fragments.transpose(2, 0, 1, 3).reshape(4, 8, 8)
    expected = matrices.swapaxes(1, 2) if trans else matrices
    np.testing.assert_array_equal(array.view(np.uint16).reshape(4, 8, 8), expected)


S, T = X.view(np.int32), Y.view(np.int32)
OTHERS = {
    "max.s32 %r9, %r1, %r2;": np.maximum(S, T),
    "min.s32 %r9, %r1, %r2;": np.minimum(S, T),
    "max.relu.s32 %r9, %r1, %r2;": np.maximum(np.maximum(S, T), 0),
    "add.s32 %r9, %r1, 0x4B400000;": S + np.int32(0x4B400000),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};": S.view(u4) << u4(16) | X >> u4(16),
    "cvt.rn.f32.s32 %r9, %r1;": S.astype(np.float32).view(np.int32),
    "cvt.rni.s32.f32 %r9, 0f4B400005;": np.full(128, 12582917),
    "cvt.u32.u8 %r9, %r1;": X & u4(0xFF),
    "shf.l.wrap.b32 %r9, %r1, %r2, 8;": (Y << u4(8)) | (X >> u4(24)),
}


@pytest.mark.parametrize("code", OTHERS)
def test_integers(code):
    expected = OTHERS[code].astype(np.int64).astype(u4)
    np.testing.assert_array_equal(lanes(code, inputs=(X, Y)), expected)


@pytest.mark.parametrize("op", ["max", "min"])
def test_three_operands(op):
    f, g = RNG.standard_normal((2, 128)).astype(np.float32)
    found = lanes(f"{op}.f32 %r9, %r1, %r2, 0f3F000000;", inputs=(f, g)).view(np.float32)
    wanted = {"max": max, "min": min}[op]
    assert found.tolist() == [
        wanted(a, b, 0.5) for a, b in zip(f.tolist(), g.tolist(), strict=True)
    ]


def test_fast_functions_at_their_ends():
    """ex2.approx.ftz flushes subnormal results; infinities, zeros and NaN are as documented."""
    x = np.array(
        [-math.inf, math.inf, 0.0, -0.0, -126, -126.5, -149, 127, 128, math.nan], np.float32
    )
    got = lanes("ex2.approx.ftz.f32 %r9, %r1;", inputs=(x,)).view(np.float32)[: len(x)]
    expected = [0, math.inf, 1, 1, 2.0**-126, 0, 0, 2.0**127, math.inf, math.nan]
    np.testing.assert_allclose(got, np.array(expected, np.float32), rtol=2**-22, atol=0)
    x = np.array([0.0, -0.0, math.inf, 1, 2.0**-126, -1, math.nan], np.float32)
    got = lanes("lg2.approx.ftz.f32 %r9, %r1;", inputs=(x,)).view(np.float32)[: len(x)]
    expected = [-math.inf, -math.inf, math.inf, 0, -126, math.nan, math.nan]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
    x = np.array([0.0, -0.0, math.inf, 4, math.nan], np.float32)
    got = lanes("rcp.approx.ftz.f32 %r9, %r1;", inputs=(x,)).view(np.float32)[: len(x)]
    np.testing.assert_array_equal(
        got, np.array([math.inf, -math.inf, 0, 0.25, math.nan], np.float32)
    )
