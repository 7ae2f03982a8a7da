"""OnlineSoftmax: the running shift and sum of a thread's two query rows."""

import math
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from .exp2 import exp2 as exp2_polynomial
from .headroom import MAX_SHIFT_LOG2
from .sequence import RaggedSpan, Span
from .views import rows_and_columns

LN2 = math.log(2.0)
LOG2_E = math.log2(math.e)
STEADY, LEAVING = -1, 2**31 - 1  # OnlineSoftmax.state, tested like the bits of a y


@dataclass(frozen=True)
class Totals:
    """What a thread's two rows come to."""

    lse: cute.Tensor  # (2,) natural log of the sum of exponentials
    weight: cute.Tensor  # (2,) the sum of the keys' weights: 1, 0 without a key, less beside a sink

    @staticmethod
    def empty() -> "Totals":
        return Totals(*(cute.make_rmem_tensor(2, Float32) for _ in range(2)))

    @cute.jit
    def store_lse(self, mLSE: cute.Tensor, queries: Span | RaggedSpan, head, row, thread):  # noqa: PLR0913
        """lse of row and row + 8, which the four threads that share them all hold."""
        rows = queries.vector(mLSE, head)  # (s_q,)
        for r in cutlass.range_constexpr(2):
            if thread % 4 == 0 and row + 8 * r < queries.length:
                rows[row + 8 * r] = self.lse[r]


@dataclass(frozen=True)
class OnlineSoftmax:
    """Softmax over blocks of scores, in base 2, normalised at the end.

        y = S * scale + shift      P = exp2(y)      shift = limit - headroom - maximum * scale

    `maximum` is the row's largest score when the shift was last moved, so P is at most
    2^(limit - headroom) then, and stays below 2^limit while no later score exceeds that maximum by
    more than 2^headroom.  Only then does the shift move again: moving it costs a multiplication of
    every element of O (FlashAttention-4's conditional rescale).  The test for a move takes one
    instruction for two scores, where a maximum would need one for each, and no exchange with the
    three threads that share the rows (_reaches_limit).

    A small score beside a large shift has lost its bits before a move could give them back.  So a
    shift beyond MAX_SHIFT_LOG2 is not added in the loop: the row is far, keeps the shift that it
    had, and its warp leaves the loop at every step, where `far` is added to the rounded y.  Near
    the maximum that sum is exact, and equal scores stay equal from block to block.
    """

    headroom: float  # compile-time, in log2
    limit: float  # compile-time, in log2
    polynomial: int  # compile-time: one of this many exponentials without the MUFU; 0: none
    shift: cute.Tensor  # (2,) 0 before the row has seen a key
    far: cute.Tensor  # (2,) what y lacks: 0 for near rows, -inf before the row has seen a key
    state: cute.Tensor  # (1,) Int32, STEADY if both rows are near
    row_sum: cute.Tensor  # (2,) this thread's part of the sum of P

    @staticmethod
    def of(headroom: float, limit: float, polynomial: int) -> "OnlineSoftmax":
        shift, far, row_sum = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
        state = cute.make_rmem_tensor(1, Int32)
        return OnlineSoftmax(headroom, limit, polynomial, shift, far, state, row_sum)

    def start(self):
        self.shift.fill(0.0)
        self.far.fill(-math.inf)
        self.state.fill(LEAVING)
        self.row_sum.fill(0.0)

    @cute.jit
    def scale(self, acc_S: cute.Tensor, scales: tuple, summand: Float32 | None) -> Boolean:
        """S -> y in place; true (warp-uniform) if move() is needed before P is computed.

        scales: a positive factor (in log2) per equal part of the columns.
        summand: None, or what all scores lack besides (in log2).
        """
        rows = rows_and_columns(acc_S)  # (2, tile_n / 4)
        part = cute.size(rows, mode=[1]) // len(scales)
        for r in cutlass.range_constexpr(2):
            shift = self.shift[r]
            if cutlass.const_expr(summand is not None):
                shift += summand
            for i in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                rows[r, i] = rows[r, i] * scales[i // part] + shift
        return cute.arch.vote_any_sync(_reaches_limit(acc_S, self.state[0], self.limit))

    @cute.jit
    def move(self, acc_S: cute.Tensor, acc_O: cute.Tensor | None, pair: Any = None):
        """Rows with a score beyond the limit take it as maximum: correct y, the sum and O.

        Far rows get what their y lack.  The warp's other rows stay as they are, to the bit: a
        row's result is its own.  acc_O is None at a tile's first block, where there is no O yet.
        pair: None, or who has the rows' other columns (sm80/forward/pair.py).
        """
        rows_S = rows_and_columns(acc_S)
        for r in cutlass.range_constexpr(2):
            top = cute.arch.warp_reduction_max(_maximum(rows_S[r, None]), threads_in_group=4)
            if cutlass.const_expr(pair is not None):
                top = pair.largest(top)
            change, correction = self.far[r], Float32(1.0)
            moved = self.limit - self.headroom - top
            moves = top != -Float32.inf
            if change != -Float32.inf:  # else the sum and O are 0 so far
                moves = top + change > self.limit
                if moves:
                    correction = cute.math.exp2(moved - change, fastmath=True)
            if moves:
                change = moved
                self._set(r, moved)
            _add(rows_S[r, None], change)
            if cutlass.const_expr(acc_O is not None):
                self.row_sum[r] *= correction
                _multiply(rows_and_columns(acc_O)[r, None], correction)
        are_near = self.far[0] == 0.0 and self.far[1] == 0.0
        self.state[0] = Int32(STEADY) if are_near else Int32(LEAVING)

    @cute.jit
    def _set(self, r: cutlass.Constexpr, change: Float32):
        """P of row r is computed from y + change from now on."""
        shift = self.shift[r] + change
        is_near = cute.arch.fmax(shift, -shift) <= MAX_SHIFT_LOG2
        self.shift[r] = shift if is_near else self.shift[r]
        self.far[r] = Float32(0.0) if is_near else change

    def exponentiate(self, acc_S: cute.Tensor):
        """y -> P in place, summed in two chains so that no addition waits for the one before."""
        rows = rows_and_columns(acc_S)
        for r in range(2):
            sums = [self.row_sum[r], None]
            for i in range(cute.size(rows, mode=[1])):
                rows[r, i] = self._exp2(rows[r, i], i)
                sums[i % 2] = rows[r, i] if sums[i % 2] is None else sums[i % 2] + rows[r, i]
            self.row_sum[r] = sums[0] + sums[1]

    def _exp2(self, y: Float32, i: int) -> Float32:
        if self.polynomial and i % self.polynomial == 0:
            return exp2_polynomial(y)
        return cute.math.exp2(y, fastmath=True)

    @cute.jit
    def finish(self, acc_O: cute.Tensor, totals: Totals, sink: Float32 | None, pair: Any = None):
        """Normalise O, and write what both rows come to.

        A row that saw no key has sum 0: O = 0, lse = -inf.
        sink: None, or a score (natural units, not scaled) without a value that joins the sum.
        pair: as of move().
        """
        rows = rows_and_columns(acc_O)
        for r in cutlass.range_constexpr(2):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            if cutlass.const_expr(pair is not None):
                total = pair.sum(total)
            is_empty = total == 0.0
            log2_sum = cute.math.log2(total, fastmath=True)
            log2_denominator = log2_sum - self.shift[r] - self.far[r]
            lse = -Float32.inf if is_empty else log2_denominator * LN2
            weight = Float32(0.0) if is_empty else Float32(1.0)
            factor = cute.arch.rcp_approx(Float32(1.0) if is_empty else total)
            if cutlass.const_expr(sink is not None):
                lse, share = _beside(sink, lse)
                weight, factor = weight * share, factor * share
            totals.lse[r], totals.weight[r] = lse, weight
            _multiply(rows[r, None], factor)


@cute.jit
def _beside(sink: Float32, lse: Float32) -> tuple:
    """The lse with the sink in the sum, and the part of that sum that the keys have.

    However far the two are apart, and where one of them, or both, are -inf.
    """
    above = (sink - lse) * LOG2_E
    if sink == -Float32.inf:
        above = -Float32.inf
    share = cute.arch.rcp_approx(1.0 + cute.math.exp2(above, fastmath=True))
    top = lse if above <= 0.0 else sink
    less = cute.math.exp2(-cute.arch.fmax(above, -above, nan=True), fastmath=True)
    return top + cute.math.log2(1.0 + less, fastmath=True) * LN2, share


def _reaches_limit(y: cute.Tensor, state: Int32, limit: float) -> Boolean:
    """Whether an element of y reaches the limit, or the state is not STEADY.

    Limit 0: every sign bit is set iff the AND of all bits has it (LOP3 takes three operands).
    Another: bit patterns of floats order as integers do where one of them is positive, and a
    maximum of three integers is one instruction (VIMNMX3); NaN with its sign clear reaches it.
    """
    bits = cute.recast_tensor(y, Int32)
    values = [bits[i] for i in range(cute.size(bits))]
    if limit == 0.0:
        start = [state, Int32(STEADY), Int32(STEADY), Int32(STEADY)]
        return _in_chains(lambda a, b: a & b, start, values) >= 0
    top = _in_chains(cutlass.max, [state, *values[:3]], values[3:])
    return top >= Float32(limit).bitcast(Int32)


def _in_chains(combine, chains: list, values: list):
    """All values combined, in four chains that take two at a time."""
    for i, value in enumerate(values):
        chain = i // 2 % 4
        chains[chain] = combine(chains[chain], value)
    return combine(combine(chains[0], chains[1]), combine(chains[2], chains[3]))


def _maximum(row: cute.Tensor) -> Float32:
    """In four chains, so that no comparison waits for the one before."""
    tops = [row[i] for i in range(4)]
    for i in range(4, cute.size(row)):
        tops[i % 4] = cute.arch.fmax(tops[i % 4], row[i])
    return cute.arch.fmax(cute.arch.fmax(tops[0], tops[1]), cute.arch.fmax(tops[2], tops[3]))


def _add(row: cute.Tensor, summand: Float32):
    for i in range(cute.size(row)):
        row[i] = row[i] + summand


def _multiply(row: cute.Tensor, factor: Float32):
    for i in range(cute.size(row)):
        row[i] = row[i] * factor
