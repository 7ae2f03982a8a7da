"""mma.sync m16n8kK: a warp multiplies 16 x K by K x 8, all operands in registers."""

from __future__ import annotations

import numpy as np

from ..numerics.formats import f2, f4, high_half, join_halves, low_half, rows
from .elements import ELEMENT, decode


def _warps(w, m) -> np.ndarray:
    if m is None:
        return np.arange(w.lanes // 32)
    return np.flatnonzero(m.reshape(-1, 32).any(1))


def mma(w, m, how, d, a, b, c):
    """how is (K, (D, A, B, C types), .satfinite); d, a, b are register numbers, c rows."""
    k, (d_type, a_type, b_type, _), saturates = how
    warps = _warps(w, m)
    n = len(warps)

    def grab(registers, kind):
        """(warps, lane, elements) of operand registers."""
        x = w.words[registers].reshape(len(registers), -1, 32)[:, warps].transpose(1, 2, 0)
        return np.ascontiguousarray(x).view(ELEMENT[kind][1])

    per, parts = 4 // ELEMENT[a_type][0], len(a) // 2  # elements per register, parts of K
    left = grab(a, a_type).reshape(n, 8, 4, parts, 2, per).transpose(0, 4, 1, 3, 2, 5)
    right = grab(b, b_type).reshape(n, 8, 4, parts, per).transpose(0, 1, 3, 2, 4)
    product = decode(left.reshape(n, 16, k), a_type) @ decode(
        right.reshape(n, 8, k), b_type
    ).swapaxes(1, 2)
    # (warp, row half, g, q, p) -> register 2 * half + p
    product = product.reshape(n, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, n, 32)
    old = np.stack([rows(x, w.lanes).reshape(-1, 32)[warps] for x in c])
    for i, values in enumerate(_sum(product, old, d_type, saturates)):
        w.U[d[i]].reshape(-1, 32)[warps] = values


def _sum(product, old, d_type, saturates):
    if d_type == "f32":
        return (product + old.view(f4)).astype(f4).view(np.uint32)
    if d_type == "s32":
        total = product.astype(np.int64) + old.view(np.int32)
        return (np.clip(total, -(2**31), 2**31 - 1) if saturates else total).astype(np.uint32)
    low = (product[0::2] + low_half(old).view(f2)).astype(f2).view(np.uint16)
    high = (product[1::2] + high_half(old).view(f2)).astype(f2).view(np.uint16)
    return join_halves(low, high)
