"""Quantisation in fp64, from its definition: what fa3.quantize_fp8 is compared with.

value = byte * descale        x (b, s, h, d) -> values (b, s, h, d) fp64, before any rounding
"""

import math
from typing import NamedTuple

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
# What fp32 may add to a code, relative to the largest one: a row of 256 sums in 8 steps, each with
# an error of 2^-24 of a value that may be a few times the largest result.
SLACK = 2.0**-20


class Quantised(NamedTuple):
    """One tensor before rounding."""

    values: torch.Tensor  # (b, s, h, d) fp64, NaN where x is not finite
    descale: torch.Tensor  # as the kernel's, fp64
    each: torch.Tensor  # (b, s, h, d) the descale of each element


def rotation(d: int, device=None) -> torch.Tensor:
    """(d, d) orthogonal: x -> x @ rotation(d). Signs (-1)^(b0 b1 + b2 b3 + ...), then Hadamard."""
    columns = torch.arange(d)
    bits = [columns >> i & 1 for i in range(8)]
    signs = 1 - 2 * (sum(bits[i] * bits[i + 1] for i in (0, 2, 4, 6)) % 2)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < d:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    return (signs[:, None] * hadamard / math.sqrt(d)).to(device)


def mean_of(x: torch.Tensor) -> torch.Tensor:
    """(b, s, h_k, d) -> (b, h_k, d) fp64; 0 where it is not finite."""
    return x.double().mean(dim=1).nan_to_num(0.0, 0.0, 0.0)


def shift_of(v: torch.Tensor, dequantised: torch.Tensor) -> torch.Tensor:
    """(b, h_k, dv) fp64: c + mean of (v - c - dequantised); 0 in place of what is not finite."""
    c = mean_of(v)
    errors = (v.double() - c[:, None] - dequantised).nan_to_num(0.0, 0.0, 0.0)
    return c + errors.mean(dim=1)


def values_of(x: torch.Tensor, mean=None, hadamard: bool = False) -> torch.Tensor:
    """(b, s, h, d) fp64."""
    values = x.double()
    values = values.masked_fill(~values.isfinite(), math.nan)
    if mean is not None:
        values = values - mean[:, None]
    return values @ rotation(x.shape[-1], x.device) if hadamard else values


def quantise(values: torch.Tensor, dtype: torch.dtype, form: str, rows: int, h_k: int) -> Quantised:
    """form: block (of `rows` rows), head (of h_k) or channel."""
    b, s, h, d = values.shape
    magnitudes = values.abs().nan_to_num(0.0).transpose(1, 2)  # (b, h, s, d)
    if form == "block":
        starts = range(0, s, rows)
        peaks = [magnitudes[:, :, i : i + rows].amax(dim=(2, 3)) for i in starts]
        peak = torch.stack(peaks, dim=2)  # (b, h, n)
        each = peak.repeat_interleave(rows, dim=2)[:, :, :s, None]
    elif form == "head":
        peak = magnitudes.unflatten(1, (h_k, h // h_k)).amax(dim=(2, 3, 4))  # (b, h_k)
        each = peak.repeat_interleave(h // h_k, dim=1)[:, :, None, None]
    else:
        peak = magnitudes.amax(dim=2, keepdim=True)  # (b, h, 1, d)
        each = peak
    each = _descale(each, dtype).transpose(1, 2).expand(b, s, h, d)
    return Quantised(values, _descale(peak, dtype), each)


def _descale(peak: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    descale = (peak / LARGEST[dtype]).clamp_min(2.0**-126)
    return descale.masked_fill(peak == 0, 1.0)


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To nearest even, saturating; NaN -> 0 in int8."""
    values = values.clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == torch.int8:
        return values.nan_to_num(0.0).round().to(dtype)
    return values.float().to(dtype)


def assert_quantised(name: str, given, descale, wanted: Quantised) -> None:
    """Descales within SLACK, relative; each byte that of a number within SLACK of the exact one.

    SLACK counts in units of the largest code, as errors of fp32 do: a byte can only differ from
    the cast of the exact number where that is next to a tie.
    """
    dtype = given.dtype
    assert descale.dtype == torch.float32
    assert descale.shape == wanted.descale.shape, name
    torch.testing.assert_close(
        descale.double(), wanted.descale, rtol=SLACK, atol=0, msg=lambda m: f"{name} descale: {m}"
    )
    codes = wanted.values / wanted.each
    slack = SLACK * LARGEST[dtype]
    low, high = (cast(codes + x, dtype).double() for x in (-slack, slack))
    given = given.double()
    is_nan = low.isnan()
    assert torch.equal(given.isnan(), is_nan), name
    wrong = ~((low <= given) & (given <= high)) & ~is_nan
    assert not wrong.any(), f"{name}: {wrong.sum()} bytes, first at {wrong.nonzero()[0].tolist()}"


def dequantise(given: torch.Tensor, descale: torch.Tensor, rows: int) -> torch.Tensor:
    """(b, s, h, d) fp64; rows per block of a descale (b, h, n)."""
    values = given.double()
    if descale.dim() == 2:
        each = descale.repeat_interleave(values.shape[2] // descale.shape[1], dim=1)[:, None, :]
        return values * each[..., None]
    if descale.dim() == 4:
        return values * descale.transpose(1, 2)
    each = descale.repeat_interleave(rows, dim=2)[:, :, : values.shape[1]]
    return values * each.transpose(1, 2)[..., None]


def check(options: dict, q, k, v, given) -> None:
    """All that quantize_fp8 gave for dense q, k and v; options that it was not given are off."""
    rows = options.get("rows_per_block", 128)
    hadamard, smooth = options.get("hadamard", False), options.get("smooth_k", False)
    form = "block" if options.get("block_scales", True) else "head"
    v_form = "channel" if options.get("v_per_channel") else form
    qk_dtype, v_dtype = options.get("qk_dtype", E4M3), options.get("v_dtype", E4M3)
    mean = mean_of(k) if smooth else None
    v_mean = mean_of(v) if options.get("smooth_v") else None
    for name, x, dtype, values, x_form, x_rows in (
        ("q", q, qk_dtype, values_of(q, None, hadamard), form, 128),
        ("k", k, qk_dtype, values_of(k, mean, hadamard), form, rows),
        ("v", v, v_dtype, values_of(v, v_mean), v_form, rows),
    ):
        bytes_, descale = getattr(given, name), getattr(given, f"{name}_descale")
        assert (bytes_.dtype, bytes_.shape, bytes_.is_contiguous()) == (dtype, x.shape, True)
        wanted = quantise(values, dtype, x_form, x_rows, k.shape[2])
        assert_quantised(name, bytes_, descale, wanted)
    assert (given.v_shift is None) == (v_mean is None)
    if v_mean is not None:
        shift = shift_of(v, dequantise(given.v, given.v_descale, rows))
        torch.testing.assert_close(given.v_shift.double(), shift, rtol=1e-6, atol=1e-6)
    if not smooth:
        assert given.lse_shift is None
        return
    group = q.shape[2] // k.shape[2]
    shift = torch.einsum("bshd,bhd->bhs", q.double(), mean.repeat_interleave(group, dim=1))
    torch.testing.assert_close(given.lse_shift.double(), shift, rtol=1e-5, atol=1e-4)
