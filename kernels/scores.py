"""Scores: from a block's product Q K^T to what the exponentials are taken of.

S  ->  function(S * factor)  ->  -inf where a key is hidden  ->  y of OnlineSoftmax
"""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from .mask import Mask
from .softmax import OnlineSoftmax
from .tensors import FwdScalars
from .views import rows_and_columns


@dataclass(frozen=True)
class SoftmaxScale:
    """The factor that every score gets: of 16-bit inputs, one-byte ones have TileScales."""

    scale_log2: Float32

    def of_scores(self, n_block, is_masked: bool) -> tuple:
        """A factor per equal part of a block's columns."""
        return (self.scale_log2,)


@dataclass(frozen=True)
class Softcap:
    """cap * tanh(x / cap) of a scaled score x, by

        tanh(z) = 1 - 2 / (1 + 2^u)        u = 2 log2(e) z

    Four instructions per score, two of them on the MUFU.  It errs by 2^-21 of the cap at most, far
    from 0 by nothing; tanh.approx, a single instruction, errs by 2^-11 of the score.
    """

    cap_log2: Float32  # cap * log2(e)

    def apply(self, acc_S: cute.Tensor, factors: tuple):
        """S -> (tanh(z) - 1) / 2 in place.  The factors of scores make u of them."""
        rows = rows_and_columns(acc_S)  # (2, tile_n / 4)
        part = cute.size(rows, mode=[1]) // len(factors)
        for r in range(2):
            for i in range(cute.size(rows, mode=[1])):
                power = cute.math.exp2(rows[r, i] * factors[i // part], fastmath=True)
                rows[r, i] = cute.arch.rcp_approx(-1.0 - power)

    def to_log2(self) -> tuple:
        """What makes scores in log2 of apply()'s results: positive factors, and a summand."""
        return (2.0 * self.cap_log2,), self.cap_log2


def _function_of(kind: str | None, scalars: FwdScalars):
    """What Signature.score names; None: scores are scaled and no more."""
    return Softcap(scalars.softcap_log2) if kind == "softcap" else None


@dataclass(frozen=True)
class Scores:
    """The scores of one query tile, as one thread sees them."""

    factors: Any  # SoftmaxScale, TileScales
    function: Any  # Softcap, or None
    mask: Mask
    softmax: OnlineSoftmax

    @staticmethod
    def of(plan, scalars: FwdScalars, factors, mask: Mask, softmax: OnlineSoftmax) -> "Scores":
        function = _function_of(plan.signature.score, scalars)
        return Scores(factors, function, mask, softmax)

    def fetch(self, n_block: Int32, is_masked: bool) -> tuple:
        """What apply() needs of memory, read ahead of the wait for the block's scores."""
        return self.factors.of_scores(n_block, is_masked)

    def apply(self, acc_S: cute.Tensor, fetched: tuple, n_block: Int32, is_masked: bool) -> Boolean:
        """S -> y in place; true (warp-uniform) if softmax.move() is needed before P is computed."""
        factors, summand = fetched, None
        if self.function is not None:
            self.function.apply(acc_S, fetched)
            factors, summand = self.function.to_log2()
        if is_masked:
            self.mask.apply(acc_S, n_block)
        return self.softmax.scale(acc_S, factors, summand)
