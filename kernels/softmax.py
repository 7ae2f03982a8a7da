"""OnlineSoftmax: the running shift and sum of a thread's two query rows."""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from .views import rows_and_columns

LN2 = math.log(2.0)
NO_KEY, SOME_KEY = 0, -1  # bit patterns of OnlineSoftmax.seen; the sign bit says "seen"


@dataclass(frozen=True)
class OnlineSoftmax:
    """Softmax over blocks of scores, in base 2, normalised at the end.

        y = S * scale_log2 + shift      P = exp2(y)      shift = -maximum * scale_log2 - headroom

    `maximum` is the row's largest score when the shift was last moved, so P is at most
    2^-headroom then, and stays below 1 while no later score exceeds that maximum by more than
    2^headroom.  Only then does the shift move again: moving it costs a multiplication of every
    element of O (FlashAttention-4's conditional rescale).  P below 1 is y below 0, so the test for
    a move is the AND of all sign bits: a three-input LOP3 for two scores, where a maximum would
    need an FMNMX for each, and no exchange with the three threads that share the rows.
    """

    scale_log2: Float32
    headroom: float  # compile-time, in log2
    shift: cute.Tensor  # (2,) 0 before the row has seen a key
    seen: cute.Tensor  # (2,) Int32, NO_KEY or SOME_KEY
    row_sum: cute.Tensor  # (2,) this thread's part of the sum of P

    @staticmethod
    def of(scale_log2: Float32, headroom: float) -> "OnlineSoftmax":
        shift, row_sum = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
        seen = cute.make_rmem_tensor(2, Int32)
        return OnlineSoftmax(scale_log2, headroom, shift, seen, row_sum)

    def start(self):
        self.shift.fill(0.0)
        self.seen.fill(NO_KEY)
        self.row_sum.fill(0.0)

    @cute.jit
    def scale(self, acc_S: cute.Tensor) -> Boolean:
        """S -> y in place; true (warp-uniform) if the shift must move before P is computed."""
        rows = rows_and_columns(acc_S)  # (2, tile_n / 4)
        for r in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                rows[r, i] = rows[r, i] * self.scale_log2 + self.shift[r]
        all_below_zero = _sign_and(acc_S, self.seen[0] & self.seen[1]) < 0
        return cute.arch.vote_any_sync(not all_below_zero)

    @cute.jit
    def move(self, acc_S: cute.Tensor, acc_O: cute.Tensor | None):
        """Rows with a score beyond the headroom take it as maximum: correct y, the sum and O.

        The warp's other rows stay as they are, to the bit: a row's result is its own.
        acc_O is None at a tile's first block, where there is no O yet.
        """
        rows_S = rows_and_columns(acc_S)
        num_columns = cute.size(rows_S, mode=[1])
        for r in cutlass.range_constexpr(2):
            top = cute.arch.warp_reduction_max(
                maximum_of([rows_S[r, i] for i in range(num_columns)]), threads_in_group=4
            )
            has_seen = self.seen[r] != NO_KEY
            change, correction = Float32(0.0), Float32(1.0)
            if has_seen:
                if top > 0.0:
                    change = -top - self.headroom
                    correction = cute.math.exp2(change, fastmath=True)
            elif top != -Float32.inf:
                change = -top - self.headroom  # the sum and O are still 0: nothing to correct
                self.seen[r] = Int32(SOME_KEY)
            self.shift[r] += change
            self.row_sum[r] *= correction
            _add(rows_S[r, None], change)
            if cutlass.const_expr(acc_O is not None):
                _multiply(rows_and_columns(acc_O)[r, None], correction)

    def exponentiate(self, acc_S: cute.Tensor):
        """y -> P in place, and to the sum."""
        exponentiate(acc_S, self.row_sum)

    @cute.jit
    def finish(self, acc_O: cute.Tensor, lse: cute.Tensor):
        """Normalise O and write the log-sum-exp (natural log) of both rows to lse (2,).

        A row that saw no key has sum 0: O = 0, lse = -inf.
        """
        rows = rows_and_columns(acc_O)
        for r in cutlass.range_constexpr(2):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            is_empty = total == 0.0
            log2_sum = cute.math.log2(total, fastmath=True)
            lse[r] = -Float32.inf if is_empty else (log2_sum - self.shift[r]) * LN2
            _multiply(rows[r, None], cute.arch.rcp_approx(Float32(1.0) if is_empty else total))


def exponentiate(acc: cute.Tensor, row_sum: cute.Tensor):
    """y -> exp2(y) in place, summed in two chains so that no addition waits for the one before."""
    rows = rows_and_columns(acc)
    for r in range(2):
        sums = [row_sum[r], None]
        for i in range(cute.size(rows, mode=[1])):
            rows[r, i] = cute.math.exp2(rows[r, i], fastmath=True)
            sums[i % 2] = rows[r, i] if sums[i % 2] is None else sums[i % 2] + rows[r, i]
        row_sum[r] = sums[0] + sums[1]


def _sign_and(values: cute.Tensor, start: Int32) -> Int32:
    """Negative iff every value and `start` have their sign bit set."""
    bits = cute.recast_tensor(values, Int32)
    chains = [start, Int32(SOME_KEY), Int32(SOME_KEY), Int32(SOME_KEY)]
    for i in range(0, cute.size(bits), 2):
        chain = i // 2 % 4
        chains[chain] = chains[chain] & bits[i] & bits[i + 1]
    return (chains[0] & chains[1]) & (chains[2] & chains[3])


def maximum_of(values: list) -> Float32:
    """In four chains, so that no comparison waits for the one before."""
    tops = values[:4]
    for i, value in enumerate(values[4:]):
        tops[i % 4] = cute.arch.fmax(tops[i % 4], value)
    return cute.arch.fmax(cute.arch.fmax(tops[0], tops[1]), cute.arch.fmax(tops[2], tops[3]))


def _add(row: cute.Tensor, summand: Float32):
    for i in range(cute.size(row)):
        row[i] = row[i] + summand


def _multiply(row: cute.Tensor, factor: Float32):
    for i in range(cute.size(row)):
        row[i] = row[i] * factor
