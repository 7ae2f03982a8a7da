"""Instructions on f16, bf16 and their packed pairs."""

from __future__ import annotations

import numpy as np

from .formats import bf16_to_f32, f2, f4, f32_to_bf16, flushing, halves, u2, unhalves


def apply(f, kind: str, *x):
    """f lane by lane on half-precision operands; kind is f16, bf16, f16x2 or bf16x2."""
    if kind == "f16":
        return f(*(v.view(f2) if v.dtype == u2 else v for v in x)).astype(f2)
    if kind == "bf16":
        return f32_to_bf16(f(*(bf16_to_f32(v) for v in x)))
    return unhalves(f(*(halves(v, kind[:-2]) for v in x)), kind[:-2])


def fma(kind: str, a, b, c, relu: bool, flushes: bool):
    def one(x, y, z):
        r = x.astype(f4) * y.astype(f4) + z.astype(f4)
        r = np.maximum(r, f4(0)) if relu else r
        return r.astype(x.dtype)

    return apply(flushing(one) if flushes else one, kind, a, b, c)
