"""Scores: from a block's product Q K^T to what the exponentials are taken of.

S  ->  function(S * factor)  ->  -inf where a key is hidden  ->  y of OnlineSoftmax

KeyScores does the same in a backward pass, where lse is known.
"""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from .key_mask import KeyMask
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

    def with_slope(self, value: Float32) -> tuple[Float32, Float32]:
        """The score in log2 where apply() made `value`, and its derivative by x.

        That is 1 - tanh(z)^2, and 0 for a hidden score, by an instruction that saturates.
        """
        tanh = 2.0 * value + 1.0
        slope = cute.arch.inline_ptx(
            "fma.rn.sat.f32 {$w0}, {$r0}, {$r1}, {$r2};",
            write_only_types=[Float32],
            read_only_args=[-tanh, tanh, Float32(1.0)],
        )
        return tanh * self.cap_log2, slope


def _function_of(kind: str | None, scalars: Any):
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


@dataclass(frozen=True)
class KeyScores:
    """The scores of one key tile in a backward pass, transposed, as one thread sees them."""

    scale_log2: Float32
    function: Any  # as in Scores
    mask: KeyMask

    @staticmethod
    def of(plan, scalars: Any, mask: KeyMask) -> "KeyScores":
        """scalars: with scale_log2 and softcap_log2 as FwdScalars has them."""
        return KeyScores(scalars.scale_log2, _function_of(plan.signature.score, scalars), mask)

    def apply(self, acc_S: cute.Tensor, m_block: Int32, is_masked: bool):
        """S -> what exponentiate() takes, in place."""
        if self.function is not None:
            self.function.apply(acc_S, (self.scale_log2,))
        if is_masked:
            self.mask.apply(acc_S, m_block)

    def exponentiate(self, acc_S: cute.Tensor, lse: cute.Tensor) -> cute.Tensor:
        """P; what stays in acc_S is P times the function's slope: dS is dP - delta times that.

        lse: of this thread's columns, in log2; or (2, 1), of its rows.
        """
        acc_P = acc_S if self.function is None else cute.make_rmem_tensor_like(acc_S)
        values, p = rows_and_columns(acc_S), rows_and_columns(acc_P)  # (2, columns)
        for i in range(cute.size(p, mode=[1])):
            for r in range(2):
                score, slope = self._of(values[r, i])
                of_query = lse[r, 0] if cute.rank(lse) == 2 else lse[i]
                p[r, i] = cute.math.exp2(score - of_query, fastmath=True)
                if slope is not None:
                    values[r, i] = p[r, i] * slope
        return acc_P

    def _of(self, value: Float32) -> tuple[Float32, Float32 | None]:
        """Of what apply() made: the score in log2, and its slope, where it is not 1."""
        if self.function is None:
            return value * self.scale_log2, None
        return self.function.with_slope(value)
