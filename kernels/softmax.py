"""OnlineSoftmax: the running maximum and sum of a thread's two rows."""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32

from .views import rows_and_columns

LN2 = math.log(2.0)
MAX_GROWTH_LOG2 = 8.0  # P stays below 2^8: exact in fp16's and bf16's range, sums fit in fp32


@dataclass(frozen=True)
class OnlineSoftmax:
    """Softmax over blocks of scores, in base 2, normalised at the end.

    P = exp2(S * scale_log2 - reference * scale_log2).  The reference is the row's maximum when it
    was last updated; it is updated only when a score exceeds it by more than 2^8 in P, because an
    update costs a multiplication of every element of O (FlashAttention-4's conditional rescale).
    That test needs no exchange between threads, so the four threads that share a row only meet
    in the rare update.  The row sum stays per thread until the end.
    """

    scale_log2: Float32
    headroom: Float32  # of a raw score above the reference: MAX_GROWTH_LOG2 / scale_log2
    reference: cute.Tensor  # (2,) raw score; -inf before the first visible key
    limit: cute.Tensor  # (2,) reference + headroom
    offset: cute.Tensor  # (2,) -reference * scale_log2; 0 while reference is -inf
    row_sum: cute.Tensor  # (2,) this thread's part
    correction: cute.Tensor  # (2,) factor for O and row_sum, valid after an update

    @staticmethod
    def of(scale_log2: Float32) -> "OnlineSoftmax":
        state = [cute.make_rmem_tensor(2, Float32) for _ in range(5)]
        return OnlineSoftmax(scale_log2, MAX_GROWTH_LOG2 / scale_log2, *state)

    def start(self):
        self.reference.fill(-Float32.inf)
        self.limit.fill(-Float32.inf)
        self.offset.fill(0.0)
        self.row_sum.fill(0.0)

    @cute.jit
    def update(self, acc_S: cute.Tensor) -> Boolean:
        """Turn scores into P in place; true (warp-uniform) if O must be multiplied by correction."""
        scores = rows_and_columns(acc_S)  # (2, tile_n / 4)
        top_0, top_1 = _maximum(scores[0, None]), _maximum(scores[1, None])
        grows = cute.arch.vote_any_sync(top_0 > self.limit[0] or top_1 > self.limit[1])
        if grows:
            self._move_reference(0, top_0)
            self._move_reference(1, top_1)
        for r in cutlass.range_constexpr(2):
            row = scores[r, None]
            for i in cutlass.range_constexpr(cute.size(row)):
                row[i] = cute.math.exp2(row[i] * self.scale_log2 + self.offset[r], fastmath=True)
            self.row_sum[r] = _sum(row, self.row_sum[r])
        return grows

    @cute.jit
    def _move_reference(self, r: cutlass.Constexpr, top: Float32):
        old = self.reference[r]
        new = cute.arch.fmax(old, cute.arch.warp_reduction_max(top, threads_in_group=4))
        finite = Float32(0.0) if new == -Float32.inf else new
        self.correction[r] = cute.math.exp2((old - finite) * self.scale_log2, fastmath=True)
        self.row_sum[r] = self.row_sum[r] * self.correction[r]
        self.reference[r] = new
        self.limit[r] = new + self.headroom
        self.offset[r] = -finite * self.scale_log2

    @cute.jit
    def rescale(self, acc_O: cute.Tensor):
        """O *= correction."""
        rows = rows_and_columns(acc_O)
        for r in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                rows[r, i] = rows[r, i] * self.correction[r]

    @cute.jit
    def finish(self, acc_O: cute.Tensor, lse: cute.Tensor):
        """Normalise O and write the log-sum-exp (natural log) of both rows to lse (2,).

        A row that saw no key has sum 0: O = 0, lse = -inf.
        """
        for r in cutlass.range_constexpr(2):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            is_empty = total == 0.0
            self.correction[r] = cute.arch.rcp_approx(Float32(1.0) if is_empty else total)
            log2_sum = cute.math.log2(total, fastmath=True)
            lse[r] = -Float32.inf if is_empty else (log2_sum - self.offset[r]) * LN2
        self.rescale(acc_O)


def _maximum(row: cute.Tensor) -> Float32:
    """Four chains, so that no maximum waits for the one before it."""
    chains = [row[i] for i in range(4)]
    for i in range(4, cute.size(row)):
        chains[i % 4] = cute.arch.fmax(chains[i % 4], row[i])
    return cute.arch.fmax(
        cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3])
    )


def _sum(row: cute.Tensor, start: Float32) -> Float32:
    """Two chains, joined at the end."""
    chains = [start + row[0], row[1]]
    for i in range(2, cute.size(row)):
        chains[i % 2] = chains[i % 2] + row[i]
    return chains[0] + chains[1]
