"""Instructions on f16, bf16 and their packed pairs."""

from __future__ import annotations

import numpy as np

from .formats import bf16_to_f32, f2, f4, f32_to_bf16, flushing, halves, u2, u4, unhalves


def apply(f, kind: str, *x):
    """f lane by lane on 16-bit operands; kind is f16, bf16, f16x2, bf16x2, u16x2 or s16x2."""
    if kind == "f16":
        return f(*(v.view(f2) if v.dtype == u2 else v for v in x)).astype(f2)
    if kind == "bf16":
        return f32_to_bf16(f(*(bf16_to_f32(v) for v in x)))
    if kind in ("u16x2", "s16x2"):
        dtype = np.int16 if kind[0] == "s" else u2
        both = ([(v >> u4(n)).astype(u2).view(dtype) for v in x] for n in (0, 16))
        low, high = (f(*of_half).view(u2).astype(u4) for of_half in both)
        return low | high << u4(16)
    return unhalves(f(*(halves(v, kind[:-2]) for v in x)), kind[:-2])


def fma(kind: str, a, b, c, relu: bool, flushes: bool):
    def one(x, y, z):
        r = x.astype(f4) * y.astype(f4) + z.astype(f4)
        r = np.maximum(r, f4(0)) if relu else r
        return r.astype(x.dtype)

    return apply(flushing(one) if flushes else one, kind, a, b, c)
