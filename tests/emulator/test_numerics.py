"""Number formats against torch, integer instructions against Python's integers."""

import numpy as np
import pytest
import torch

from fa3.emulator.numerics import convert, formats, integers

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    3.4e38,
    -3.4e38,
    1e-40,
    np.inf,
    -np.inf,
    np.nan,
    65504,
    65520,
    448,
    464,
    480,
    57344,
    61440,
    2**-9,
    2**-10,
    1.5 * 2**-10,
    2**-17,
    0.0625,
    17,
    18,
    19,
]


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(4096) * 2.0 ** rng.integers(-20, 20, 4096)
    return np.concatenate([SPECIAL, spread]).astype(np.float32)


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def test_bf16_rounds_as_torch_does(values):
    ours = formats.f32_to_bf16(values)
    theirs = torch.from_numpy(values).bfloat16()
    nan = np.isnan(values)
    assert (ours[~nan] == theirs.view(torch.uint16).numpy()[~nan]).all()
    assert (ours[nan] == 0x7FFF).all()
    np.testing.assert_array_equal(formats.bf16_to_f32(ours)[~nan], theirs.float().numpy()[~nan])


def test_bf16_toward_zero_never_grows(values):
    finite = values[np.isfinite(values)]
    down = formats.bf16_to_f32(formats.f32_to_bf16(finite, toward_zero=True))
    assert (np.abs(down) <= np.abs(finite)).all()
    assert (np.abs(down) >= np.abs(finite) * (1 - 2**-7) - 1e-38).all()


@pytest.mark.parametrize(
    "kind, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_fp8_codes_and_rounding(values, kind, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(formats.FP8[kind], codes.view(dtype).float().numpy())
    limit = torch.finfo(dtype).max
    finite = values[np.isfinite(values)]
    saturated = torch.from_numpy(np.clip(finite, -limit, limit)).to(dtype)
    np.testing.assert_array_equal(
        formats.f32_to_fp8(finite, kind), saturated.view(torch.uint8).numpy()
    )
    top = {"e4m3": 0x7E, "e5m2": 0x7B}[kind]
    odd = formats.f32_to_fp8(np.array([np.nan, np.inf, -np.inf], np.float32), kind)
    assert odd.tolist() == [0x7F, top, top | 0x80]


def test_pairs_have_the_first_source_in_the_upper_half(values):
    hi, lo = values[:128], values[128:256]
    packed = convert.pack("f16x2", ("rn",), hi, lo, 128)
    np.testing.assert_array_equal(
        packed.view(np.float16).reshape(-1, 2).astype(np.float32),
        np.stack([lo, hi], 1).astype(np.float16).astype(np.float32),
    )
    fp8 = convert.pack("e4m3x2", ("rn", "satfinite"), lo, lo, 128)
    back = convert.repack("f16x2", "e4m3x2", (), fp8).view(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(back[:, 0], formats.FP8["e4m3"][fp8 & 0xFF].astype(np.float16))


@pytest.mark.parametrize(
    "mode, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_float_to_integer_saturates(mode, function):
    x = np.array([-3e9, -2.5, -0.5, 0.5, 1.5, 2.7, 3e9, np.nan], np.float32)
    expected = np.clip(np.nan_to_num(function(x.astype(np.float64))), -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(convert.scalar("s32", "f32", (mode,), x), expected)
    assert convert.scalar("u8", "f32", (mode,), x[[0, -2]]).tolist() == [0, 255]


A = np.random.default_rng(1).integers(0, 2**32, 200, dtype=np.uint32)
B = np.random.default_rng(2).integers(0, 2**32, 200, dtype=np.uint32)
N = np.random.default_rng(3).integers(0, 40, 200, dtype=np.uint32)


def each(function, *arrays):
    return [function(*(int(x) for x in row)) for row in zip(*arrays, strict=True)]


def test_products_and_quotients():
    assert integers.mulhi(A, B).tolist() == each(lambda a, b: a * b >> 32, A, B)
    signed, other = A.view(np.int32), B.view(np.int32)
    assert integers.mulhi(signed, other).tolist() == each(lambda a, b: a * b >> 32, signed, other)
    assert integers.divide(signed, other).tolist() == each(
        lambda a, b: int(np.sign(a) * np.sign(b)) * (abs(a) // abs(b)), signed, other
    )


def test_bit_fields():
    assert integers.extract_bits(A, N, N[::-1]).tolist() == each(
        lambda a, p, n: (a >> p) & ((1 << min(n, 32)) - 1), A, N, N[::-1]
    )
    inserted = integers.insert_bits(A, B, N % 32, N[::-1] % 32)
    assert inserted.tolist() == each(
        lambda a, b, p, n: (b & ~(((1 << n) - 1) << p) | (a & ((1 << n) - 1)) << p) % 2**32,
        A,
        B,
        N % 32,
        N[::-1] % 32,
    )
    assert integers.funnel_shift(A, B, N, True, True).tolist() == each(
        lambda lo, hi, n: ((hi << 32 | lo) << n % 32 >> 32) % 2**32, A, B, N
    )


def test_bit_counts():
    assert integers.leading_zeros(A >> N % 32).tolist() == each(
        lambda a: 32 - a.bit_length(), A >> N % 32
    )
    assert integers.reverse_bits(A).tolist() == each(lambda a: int(f"{a:032b}"[::-1], 2), A)


def test_lop3_is_its_truth_table():
    table = 0b11001010  # a ? b : c
    c = A ^ np.uint32(0x5A5A5A5A)
    np.testing.assert_array_equal(integers.lop3(A, B, c, table), (A & B) | (~A & c))


def test_permute_bytes():
    def model(a, b, s):
        pool, out = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], []
        for j in range(4):
            choice = s >> 4 * j & 15
            byte = pool[choice & 7]
            out.append((255 if byte & 128 else 0) if choice & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    selector = B >> np.uint32(7)
    assert integers.permute_bytes(A, B, selector).tolist() == each(model, A, B, selector)
