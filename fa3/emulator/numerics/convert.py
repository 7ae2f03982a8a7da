"""PTX cvt."""

from __future__ import annotations

import numpy as np

from .formats import (
    FP8,
    bf16_to_f32,
    f2,
    f4,
    f8,
    f32_to_bf16,
    f32_to_f16,
    f32_to_fp8,
    flush,
    flushed,
    halves,
    join_halves,
    rows,
    u2,
    u4,
    unhalves,
)

_FLOAT = {"f16": f2, "f32": f4, "f64": f8}
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def pack(dst: str, mods: tuple[str, ...], hi, lo, n: int):
    """Two f32 rows -> a packed pair (f16x2, bf16x2, e4m3x2, e5m2x2)."""
    hi, lo = rows(hi, n), rows(lo, n)
    if "relu" in mods:
        hi, lo = np.maximum(hi, f4(0)), np.maximum(lo, f4(0))
    rz = "rz" in mods
    if dst == "f16x2":
        return join_halves(f32_to_f16(lo, rz).view(u2), f32_to_f16(hi, rz).view(u2))
    if dst == "bf16x2":
        return join_halves(f32_to_bf16(lo, rz), f32_to_bf16(hi, rz))
    return f32_to_fp8(lo, dst[:4]).astype(u2) | (f32_to_fp8(hi, dst[:4]).astype(u2) << u2(8))


def repack(dst: str, src: str, mods: tuple[str, ...], x):
    """A packed pair -> a packed pair: cvt.f16x2.e4m3x2, cvt.e5m2x2.f16x2 and friends."""
    if dst[:4] in FP8:
        lo, hi = (v.astype(f4) for v in halves(x, src[:-2]))
        return pack(dst, mods, hi, lo, len(x))
    table = FP8[src[:4]]
    both = table[np.stack([x & u2(0xFF), x >> u2(8)])]
    return unhalves(np.maximum(both, f4(0)) if "relu" in mods else both, dst[:-2])


def scalar(dst: str, src: str, mods: tuple[str, ...], x):
    """One value per lane; x has the source's dtype, the result the destination's."""
    if "ftz" in mods:
        x = flushed(x) if src == "f32" else x
        r = scalar(dst, src, tuple(m for m in mods if m != "ftz"), x)
        return flush(r) if dst == "f32" else r
    if src == "bf16":
        x, src = bf16_to_f32(x), "f32"
    if src == "tf32":
        src = "f32"
    if dst in _FLOAT or dst in ("bf16", "tf32"):
        return _to_float(dst, src, mods, x)
    return _to_integer(dst, src, mods, x)


def _rounding(mods):
    return next((_ROUND[m] for m in mods if m in _ROUND), None)


def _to_float(dst, src, mods, v):
    rounding = _rounding(mods)
    if src in _FLOAT and rounding is not None:
        v = rounding(v)
    if "sat" in mods:
        v = np.clip(np.nan_to_num(v), 0, 1)
    if "relu" in mods:
        v = np.maximum(v, 0)
    if dst == "bf16":
        return f32_to_bf16(v.astype(f4), "rz" in mods)
    if dst == "tf32":
        return ((v.astype(f4).view(u4) + u4(0x1000)) & u4(0xFFFFE000)).view(f4)
    if src[0] in "su" and dst == "f32" and "rz" in mods:
        r = v.astype(f8).astype(f4)
        return np.where(np.abs(r.astype(f8)) > np.abs(v.astype(f8)), np.nextafter(r, f4(0)), r)
    if dst == "f16" and src == "f32":
        return f32_to_f16(v.astype(f4), "rz" in mods)
    return v.astype(_FLOAT[dst])


def _to_integer(dst, src, mods, x):
    bits = int(dst[1:])
    dtype = np.dtype(("i" if dst[0] == "s" else "u") + str(bits // 8))
    limits = np.iinfo(dtype)
    if src in _FLOAT:
        nan = 1 << bits - 1 if src == "f64" or bits == 64 else 0
        v = (_rounding(mods) or np.trunc)(x.astype(f8))
        beyond = np.where(v >= float(limits.max), limits.max, limits.min).astype(dtype)
        inside = (v > float(limits.min)) & (v < float(limits.max))
        found = np.where(inside, np.where(inside, v, 0).astype(dtype), beyond)
        return np.where(np.isnan(v), np.array(nan, f"u{bits // 8}").view(dtype), found)
    if "sat" in mods:
        own = np.iinfo(x.dtype)
        return np.clip(x, max(limits.min, own.min), min(limits.max, own.max)).astype(dtype)
    return x.astype(dtype)
