"""What attention of one-byte inputs is measured against: exact, with P in e4m3, bounds of its LSE.

q (b, s_q, h_q, d), k (b, s_k, h_k, d), v (b, s_k, h_k, dv), times their scales, in fp64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3.kernels.headroom import HEADROOM_LOG2, LIMIT_LOG2

from .reference import visible

LIMIT, HEADROOM = LIMIT_LOG2["e4m3"], HEADROOM_LOG2["e4m3"]  # of P, the same for int8
E4M3_ERROR = 2.0**-4  # largest relative error of rounding
E4M3_RMS = E4M3_ERROR / 3**0.5  # its root mean square, at most: uniform, just above a power of two
E4M3_STEP = 2.0**-10  # largest absolute error below the smallest normal number


@dataclass(frozen=True)
class Attention:
    """Weights and values of all heads, before anything is rounded."""

    y: Tensor  # (b, h_q, s_q, s_k) scores in log2, relative to the row's largest
    lse: Tensor  # (b, h_q, s_q) fp64
    v: Tensor  # (b, h_q, s_k, dv)
    shift: Tensor  # (b, h_q, 1, dv), to be added to all of v
    sink: Tensor  # (b or 1, h_q, s_q, 1) a score without a value, relative as y; -inf: none

    @staticmethod
    def of(  # noqa: PLR0913
        q, k, v, scale: float, causal=False, window=(-1, -1), shift=None, softcap=0.0, sink=None
    ) -> "Attention":
        """shift: (b, h_k, dv); sink: (h_q,) or (b, h_q)"""
        q, k, v = (torch.as_tensor(x).transpose(1, 2) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        shift = torch.zeros(1, k.shape[1], 1) if shift is None else shift
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        shift = shift.repeat_interleave(group, dim=1)[:, :, None]
        seen = visible(q.shape[2], k.shape[2], causal, window, q.device)
        scores = scale * q @ k.mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -math.inf)
        sink = torch.full((q.shape[1],), -math.inf) if sink is None else sink
        sink = sink.to(scores.dtype)[..., None, None].expand(*sink.shape, scores.shape[2], 1)
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -math.inf, 0.0)
        lse = torch.logaddexp(torch.logsumexp(scores, dim=-1), sink[..., 0])
        y, sink = ((x - top) / math.log(2.0) for x in (scores, sink))
        return Attention(y, lse, v, shift, sink)

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(b, s_q, h_q, dv)"""
        p = self.y.exp2()
        return self.normalised(p @ self.v, p.sum(-1, keepdim=True), dtype)

    def baseline(self, dtype: torch.dtype, tile_n: int, sums_rounded: bool) -> Tensor:
        """P in e4m3; each block of keys in fp32, blocks added in fp32, the last one first.

        P is relative to a maximum that moves as the kernel's does (kernels/softmax.py): the largest
        P of a row is not always a power of two, which e4m3 holds as it is.
        sums_rounded: P is divided by the sum of the rounded P.
        """
        shape = self.y.shape[:-1]
        maximum = torch.full((*shape, 1), -math.inf, dtype=self.y.dtype)
        out, total = torch.zeros(*shape, self.v.shape[-1]), torch.zeros(*shape, 1)
        for start in reversed(range(0, self.y.shape[-1], tile_n)):
            y, v = self.y[..., start : start + tile_n], self.v[:, :, start : start + tile_n]
            top, before = y.amax(-1, keepdim=True), maximum
            maximum = torch.where(top > before + HEADROOM, top, before)
            change = (before - maximum).exp2().nan_to_num(0.0).float()  # no key so far: -inf + inf
            p = (y - maximum + LIMIT - HEADROOM).exp2().nan_to_num(0.0)
            rounded = p.to(torch.float8_e4m3fn).float()
            out = change * out + rounded @ v.float()
            total = change * total + (rounded if sums_rounded else p.float()).sum(-1, keepdim=True)
        return self.normalised(out, total, dtype, LIMIT - HEADROOM - maximum)

    def lse_bounds(self) -> tuple[Tensor, Tensor]:
        """(b, h_q, s_q): what rounding P may do to the LSE at most, and its standard deviation.

        The kernel's row sum is sum(P (1 + e)), |e| <= 2^-4, and an absolute error of 2^-10 at most
        for P below e4m3's normal numbers; a row's largest P is at least 2^(limit - headroom). So
            |LSE - exact| <= -log(1 - 2^-4 - n 2^-10 / 2^(limit - headroom) / sum(p))
        for p = P relative to the largest, and as errors are independent of each other its deviation
        is rms(e) sqrt(sum(p^2)) / sum(p) = rms(e) / sqrt(effective keys). A sink is not rounded.
        """
        p = self.y.exp2()
        of_keys, keys = p.sum(-1), (p > 0).sum(-1)
        total = of_keys + self.sink.exp2()[..., 0]
        step = E4M3_STEP / 2.0 ** (LIMIT - HEADROOM)
        worst = -torch.log1p(-((E4M3_ERROR * of_keys + keys * step) / total).clamp(max=0.5))
        deviation = (E4M3_RMS**2 * p.square().sum(-1) + keys * step**2 / 3).sqrt() / total
        return worst, deviation

    def normalised(self, out, total, dtype, unit=0.0) -> Tensor:
        """unit: log2 of what a weight of 1 is in the total."""
        whole = total + (self.sink + unit).exp2().masked_fill(self.sink == -math.inf, 0.0)
        whole = whole.masked_fill(whole == 0.0, 1.0)
        return (out / whole + self.shift * (total / whole)).to(dtype).transpose(1, 2)
