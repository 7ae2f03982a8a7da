"""The forward kernel for one-byte inputs in plain torch: its roundings, in its order.

Per block of keys, from the last to the first (kernels/softmax.py, forward/operands_fp8.py):

    S = Q K^T           y = S * scale + shift, moved for rows beyond the limit
    P = exp2(y), cast to e4m3
    O = O + P V, each block's P V from zero (two-level accumulation), V with a column of ones

Products are exact and are summed in fp32 in torch's order, and exp2 is torch's: a P beside a
rounding tie may differ from the kernel's by one unit of e4m3.  Results agree to a small part of
the error that FP8 makes, not to the bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3.kernels.headroom import HEADROOM_LOG2, LIMIT_LOG2, MAX_SHIFT_LOG2

from .reference import visible

LN2 = math.log(2.0)
Q_BLOCK = 128  # queries per scale
LARGEST = 448.0  # of e4m3

STEP = 32  # products that one wgmma adds
FRACTION = 13  # bits that the short accumulator keeps below its largest term
SMALLEST = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}  # exponents of subnormal values
EXPONENT_OF_ZERO = -126


@dataclass(frozen=True)
class Numerics:
    """How the kernel and the tensor core add."""

    tile_n: int = 128
    sums_rounded: bool = True  # row sums are those of the rounded P; else of P in fp32
    is_two_level: bool = True  # else all products P V meet in one accumulator
    is_short: bool = False  # the accumulator of Hopper's FP8 wgmma, else fp32
    exp2: Callable[[Tensor], Tensor] = torch.exp2  # of P
    limit: float = LIMIT_LOG2["e4m3"]
    headroom: float = HEADROOM_LOG2["e4m3"]


KERNEL = Numerics()


def attention(
    inputs, *, softmax_scale=None, causal=False, window=(-1, -1), rows=None, numerics=KERNEL
):
    """Attention of quantised inputs: what has the first six fields of fa3.quantize.Fp8Inputs.

    rows: indices of the queries to compute, None for all.
    Returns out (b, rows, h_q, dv) and lse (b, h_q, rows) of the k given, both in fp32.
    """
    q, k, v, q_descale, k_descale, v_descale = inputs[:6]
    (_, s_q, h_q, d), (_, s_k, h_k, dv) = q.shape, v.shape
    rows = torch.arange(s_q) if rows is None else rows
    seen = visible(s_q, s_k, causal, window)[rows]
    scale_log2 = (d**-0.5 if softmax_scale is None else softmax_scale) / LN2
    q_scale = _by_row(q_descale, s_q, (Q_BLOCK,), h_q)[:, :, rows] * torch.tensor(scale_log2)
    k_scale = _by_row(k_descale, s_k, (64, 128), h_q).mT  # (b, h_q, 1, s_k)
    is_by_channel = v_descale.dim() == 4
    v_scale = None if is_by_channel else _by_row(v_descale, s_k, (64, 128), h_q)
    q, k, v = (_heads_first(x, h_q) for x in (q[:, rows], k, v))

    softmax = _Softmax.of(q.shape[:3], numerics)
    O = torch.zeros(*q.shape[:3], dv + 1)  # the last column sums P
    for start in reversed(range(0, s_k, numerics.tile_n)):
        keys = slice(start, start + numerics.tile_n)
        S = _product(None, q, k[:, :, keys].mT, numerics)
        scale = q_scale * k_scale[..., keys]
        S = S.masked_fill(~seen[:, keys], -math.inf)
        y = _fma(S, scale, softmax.shift)
        P, correction = softmax.exponentiate(y)
        P = P.clamp(max=LARGEST).to(torch.float8_e4m3fn)
        of_block = torch.ones(1) if is_by_channel else _only(v_scale[:, :, keys])
        scale = torch.ones(*of_block.shape[:-1], dv + 1) * of_block
        scale[..., -1] = 1.0
        O, V = O * correction, _with_ones(v[:, :, keys])
        if numerics.is_two_level:
            O = _fma(_product(None, P, V, numerics), scale, O)
        else:
            O = _product(O / scale, P, V, numerics) * scale

    O, rounded_sum = O[..., :-1], O[..., -1:]
    row_sum = rounded_sum if numerics.sums_rounded else softmax.row_sum
    channels = v_descale.repeat_interleave(h_q // h_k, dim=1) if is_by_channel else 1.0
    is_empty = row_sum == 0.0
    lse = (torch.log2(row_sum) - softmax.shift - softmax.far) * LN2
    lse = lse.masked_fill(is_empty, -math.inf).squeeze(-1)
    return (O / row_sum.masked_fill(is_empty, 1.0) * channels).transpose(1, 2), lse


@dataclass
class _Softmax:
    """fa3.kernels.softmax.OnlineSoftmax: every row moves for itself."""

    numerics: Numerics
    shift: Tensor  # (b, h, rows, 1)
    far: Tensor  # -inf before a row has seen a key
    row_sum: Tensor

    @staticmethod
    def of(rows: tuple[int, ...], numerics: Numerics) -> "_Softmax":
        shift = torch.zeros(*rows, 1)
        return _Softmax(numerics, shift, torch.full_like(shift, -math.inf), shift.clone())

    def exponentiate(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """P, and by what to multiply O."""
        limit, headroom = self.numerics.limit, self.numerics.headroom
        top, far = y.amax(-1, keepdim=True), self.far
        is_first = (far == -math.inf) & (top > -math.inf)
        moves = is_first | (top + far > limit)
        moved = limit - headroom - top
        correction = torch.exp2((moved - far).clamp(max=0.0)).masked_fill(~moves, 1.0)
        change = torch.where(moves, moved, far)
        P = self.numerics.exp2(y + change)
        shift = self.shift + moved
        is_near = shift.abs() <= MAX_SHIFT_LOG2
        self.shift = torch.where(moves & is_near, shift, self.shift)
        self.far = torch.where(moves, torch.where(is_near, 0.0, moved), far)
        self.row_sum = self.row_sum * correction + P.sum(-1, keepdim=True)
        return P, correction


def _with_ones(v: Tensor) -> Tensor:
    """(.., n, dv) -> (.., n, dv + 1)"""
    ones = torch.ones(*v.shape[:-1], 1).to(v.dtype)
    return torch.cat([x.view(torch.uint8) for x in (v, ones)], dim=-1).view(v.dtype)


def _heads_first(x: Tensor, h_q: int) -> Tensor:
    """(b, s, h, d) -> (b, h_q, s, d)"""
    x = x.transpose(1, 2)
    groups = h_q // x.shape[1]
    return x if groups == 1 else x.view(torch.int8).repeat_interleave(groups, 1).view(x.dtype)


def _by_row(descale: Tensor, length: int, blocks: tuple[int, ...], h_q: int) -> Tensor:
    """(b, h) or (b, h, n) -> (b, h_q, length, 1)"""
    if descale.dim() == 2:
        rows = descale[:, :, None].expand(-1, -1, length)
    else:
        (block, *_) = [b for b in blocks if -(-length // b) == descale.shape[2]]
        rows = descale.repeat_interleave(block, dim=2)[:, :, :length]
    return rows.repeat_interleave(h_q // descale.shape[1], dim=1)[..., None]


def _only(scales: Tensor) -> Tensor:
    """(b, h_q, n, 1) -> (b, h_q, 1, 1) of keys that share a scale."""
    assert (scales == scales[:, :, :1]).all(), "a product P V runs over keys of one scale"
    return scales[:, :, :1]


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a.double() * b.double() + c.double()).float()


def _product(total: Tensor | None, a: Tensor, b: Tensor, numerics: Numerics) -> Tensor:
    """total (b, h, m, n) + a (b, h, m, k) b (b, h, k, n), of one-byte a and b."""
    if not numerics.is_short or a.dtype == torch.int8:
        product = a.float() @ b.float()
        return product if total is None else total + product
    total = torch.zeros(*a.shape[:3], b.shape[3]) if total is None else total
    for k in range(0, a.shape[3], STEP):
        total = _add_short(total, a[..., k : k + STEP], b[:, :, k : k + STEP])
    return total


def _add_short(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One wgmma of Hopper on FP8 operands; the model of fa3/emulator/numerics/short_sum.py.

    Every term is cut to FRACTION bits below the largest exponent, their exact sum once more.
    """
    exponents = _exponents(a)[..., None] + _exponents(b)[..., None, :, :]  # (b, h, m, 32, n)
    top = torch.maximum(exponents.amax(-2), _exponents(total)).clamp_min(-100)
    unit = torch.ldexp(torch.ones_like(total), top - FRACTION)
    terms = a.float()[..., None] * b.float()[..., None, :, :] / unit[..., None, :]
    total = (terms.trunc_().sum(-2) + torch.trunc(total / unit)) * unit
    return (total.view(torch.int32) & -(1 << 23 - FRACTION)).view(torch.float32)


def _exponents(x: Tensor) -> Tensor:
    values = x.float()
    exponents = torch.frexp(values).exponent - 1
    exponents = exponents.clamp_min(SMALLEST.get(x.dtype, -126))
    return exponents.masked_fill(values == 0, EXPONENT_OF_ZERO)
