"""wgmma on bytes, against models of one element at a time written from the PTX manual."""

import math
from fractions import Fraction

import numpy as np
import pytest

from fa3.emulator.numerics import short_sum

from .ptx_runner import launch

M, N, K = 64, 8, 32
FP8 = {"e4m3": (3, 7), "e5m2": (2, 15)}  # fraction bits, bias
BYTES = ("s8", "u8")
NAN = {"e4m3": [0x7F, 0xFF], "e5m2": [0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF]}


def parts(code: int, kind: str) -> tuple[Fraction, int]:
    """(significand below 2 with its sign, exponent) of an FP8 code or, for "f32", of a float."""
    if kind == "f32":
        significand, exponent = math.frexp(code)
        if significand == 0:
            return Fraction(0), -126
        return Fraction(significand) * 2, exponent - 1
    fraction, bias = FP8[kind]
    sign, field = (-1 if code & 0x80 else 1), (code & 0x7F) >> fraction
    significand = Fraction(code & (1 << fraction) - 1, 1 << fraction) + (field > 0)
    if significand == 0:
        return Fraction(0), -126
    return sign * significand, max(field, 1) - bias


def value(code: int, kind: str) -> Fraction:
    significand, exponent = parts(code, kind)
    return significand * Fraction(2) ** exponent


def short(c: float, a, b, kinds) -> float:
    """c + a . b, 32 products, as Hopper adds them."""
    terms = [parts(c, "f32")]
    for x, y in zip(a, b, strict=True):
        (p, s), (q, t) = parts(int(x), kinds[0]), parts(int(y), kinds[1])
        terms.append((p * q, s + t))
    top = max(e for _, e in terms)
    total = sum(math.trunc(s * Fraction(2) ** (13 + e - top)) for s, e in terms)
    bits = max(abs(total).bit_length() - 14, 0)  # beyond 13 fraction bits
    return math.copysign(float((abs(total) >> bits << bits) * Fraction(2) ** (top - 13)), total)


def codes(rng, shape, kind):
    if kind in FP8:
        usable = np.setdiff1d(np.arange(256), NAN[kind]).astype(np.uint8)
        return rng.choice(usable, shape)
    return rng.integers(0, 256, shape).astype(np.uint8)


def core_matrices(x):
    """(rows, 32) bytes in the order of an unswizzled K-major descriptor with LBO 128, SBO 256."""
    return x.reshape(-1, 8, 2, 16).transpose(0, 2, 1, 3).ravel()


def run(kinds, a, b, c, from_registers=False, flags="", accumulator="fp32", steps=1):
    """d = c + a b^T by `steps` equal wgmmas; a (64, 32), b (8, 32) bytes, c (64, 8) of 4 bytes."""
    array = np.zeros(16 * 1024, np.uint8)
    array[:2048], array[2048:2304] = core_matrices(a), core_matrices(b)
    g = a.reshape(4, 2, 8, 2, 4, 4)  # warp, row half, g, k half, q, byte
    array[4096:6144] = g.transpose(0, 2, 4, 3, 1, 5).ravel()  # of a lane: 4 registers
    lanes = c.view(np.uint32).reshape(4, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
    array[8192:10240] = lanes.ravel().view(np.uint8)
    d = "s32" if kinds[0] in ("s8", "u8") else "f32"
    signs = "" if d == "s32" else ", 1, 1"
    left = "{%r20,%r21,%r22,%r23}" if from_registers else "%rd3"
    product = (
        f"wgmma.mma_async.sync.aligned.m64n8k32{flags}.{d}.{kinds[0]}.{kinds[1]} "
        f"{{%r10,%r11,%r12,%r13}}, {left}, %rd4, 1{signs};\n"
    )
    stride = 128 >> 4 << 16 | 256 >> 4 << 32
    launch(
        f"""mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %rd0, %rd1;
        mov.u32 %r1, buffer; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2;
        ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, [%rd2]; st.shared.v4.b32 [%r3], {{%r4,%r5,%r6,%r7}};
        setp.lt.u32 %p1, %r0, 16;
        @%p1 ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, [%rd2+2048];
        @%p1 st.shared.v4.b32 [%r3+2048], {{%r4,%r5,%r6,%r7}};
        ld.global.v4.b32 {{%r20,%r21,%r22,%r23}}, [%rd2+4096];
        ld.global.v4.b32 {{%r10,%r11,%r12,%r13}}, [%rd2+8192];
        fence.proxy.async.shared::cta; bar.sync 0;
        shr.u32 %r8, %r1, 4; cvt.u64.u32 %rd5, %r8;
        add.s64 %rd3, %rd5, {stride}; add.s64 %rd4, %rd3, 128;
        wgmma.fence.sync.aligned;
        {product * steps}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        st.global.v4.b32 [%rd2+12288], {{%r10,%r11,%r12,%r13}};""",
        array,
        accumulator=accumulator,
    )
    found = array[12288:14336].view(np.uint32).reshape(4, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)
    return np.ascontiguousarray(found).reshape(M, N).view(c.dtype)


PAIRS = [(a, b) for a in FP8 for b in FP8]
VALUES = {kind: np.array([float(value(c, kind)) for c in range(256)]) for kind in FP8}


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("from_registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_fp8_products_are_those_of_the_values(rng, kinds, from_registers):
    a, b = codes(rng, (M, K), kinds[0]), codes(rng, (N, K), kinds[1])
    c = rng.standard_normal((M, N)).astype(np.float32)
    left, right = (VALUES[kind][x] for kind, x in zip(kinds, (a, b), strict=True))
    exact = left @ right.T
    np.testing.assert_allclose(run(kinds, a, b, c, from_registers), c + exact, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_the_short_accumulator_is_bit_for_bit_the_model(rng, kinds):
    from_registers = kinds[0] != kinds[1]
    a, b = codes(rng, (M, K), kinds[0]), codes(rng, (N, K), kinds[1])
    a[rng.random((M, K)) < 0.1] = 0
    c = (rng.standard_normal((M, N)) * 2.0 ** rng.integers(-20, 30, (M, N))).astype(np.float32)
    c[0] = 0
    expected = c.astype(float)
    for _ in range(2):
        expected = [[short(expected[i][j], a[i], b[j], kinds) for j in range(N)] for i in range(M)]
    found = run(kinds, a, b, c, from_registers, accumulator="short", steps=2)
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    assert (run(kinds, a, b, c, from_registers, steps=2) != found).any(), "fp32 keeps more"


def test_an_accumulator_keeps_13_fraction_bits():
    """What SageAttention2 saw on Hopper: with A and B zero, the last ten bits of C are lost."""
    a, b = np.zeros((M, K), np.uint8), np.zeros((N, K), np.uint8)
    c = np.random.default_rng(1).standard_normal((M, N)).astype(np.float32)
    kept = (c.view(np.uint32) & np.uint32(0xFFFFFC00)).view(np.float32)
    np.testing.assert_array_equal(run(("e4m3", "e4m3"), a, b, c, accumulator="short"), kept)


def test_a_long_sum_of_ones_stops_growing():
    one = np.ones((1, K), np.float32)
    c = np.zeros((1, 1), np.float32)
    for _ in range(1000):
        c = short_sum.add_products(c, one, one.T.copy(), ("f32", "e4m3", "e4m3"))
    assert c == 2**14, "from here on a one is less than the last bit"


def test_special_values_and_f16_sums():
    a, b = np.zeros((4, K), np.float32), np.ones((K, 1), np.float32)
    a[:, 0] = [np.nan, np.inf, -np.inf, -0.0]
    c = np.array([[0], [1], [np.inf], [-0.0]], np.float32)
    got = short_sum.add_products(c, a, b, ("f32", "e5m2", "e5m2"))
    assert got.view(np.uint32).ravel().tolist() == [0x7FFFFFFF, 0x7F800000, 0x7FFFFFFF, 0]
    a[:] = 0
    a[0, :2] = 2.0, 2.0**-9  # a tie of f16, to even; f32 sums would keep it
    c = np.full((4, 1), 0, np.float32)
    half = short_sum.add_products(c, a, b, ("f16", "e5m2", "e5m2"))
    assert half[0] == 2 + 2.0**-9
    a[0, :2] = 4.0, 2.0**-9
    assert short_sum.add_products(c, a, b, ("f16", "e5m2", "e5m2"))[0] == 4
    assert short_sum.add_products(c, a, b, ("f32", "e5m2", "e5m2"))[0] == 4 + 2.0**-9


@pytest.mark.parametrize("flags", ["", ".satfinite"])
@pytest.mark.parametrize("from_registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("kinds", [(a, b) for a in BYTES for b in BYTES], ids="-".join)
def test_integers(rng, kinds, from_registers, flags):
    a, b = codes(rng, (M, K), kinds[0]), codes(rng, (N, K), kinds[1])
    c = rng.integers(-(2**31), 2**31, (M, N)).astype(np.int32)
    c[:, :3] = 2**31 - 1, -(2**31), 0x4B400000
    left, right = (
        x.view(np.int8 if kind == "s8" else np.uint8).astype(int)
        for x, kind in zip((a, b), kinds, strict=True)
    )
    product = left @ right.T
    expected = c.astype(int)
    for _ in range(2):
        expected = expected + product
        if flags:
            expected = np.clip(expected, -(2**31), 2**31 - 1)
    found = run(kinds, a, b, c, from_registers, flags, steps=2)
    np.testing.assert_array_equal(found, expected.astype(np.uint32).view(np.int32))


def test_int8_scores_as_floats_without_a_conversion(rng):
    """An accumulator that starts at 0x4B400000 ends as the float 12582912 + the sum."""
    a, b = codes(rng, (M, K), "s8"), codes(rng, (N, K), "s8")
    start = np.full((M, N), 0x4B400000, np.int32)
    floats = run(("s8", "s8"), a, b, start).view(np.float32)
    products = a.view(np.int8).astype(int) @ b.view(np.int8).astype(int).T
    np.testing.assert_array_equal(floats - np.float32(12582912), products)
