"""ScaledSoftmax: online softmax of one-byte products, with the exact running maximum."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from .softmax import LN2, exponentiate, maximum_of
from .views import rows_and_columns

# P is computed times 2^8: e4m3 holds 2^-9 to 448, so that the largest P, 256, keeps its three bits
# and one of 2^-14 still two (FlashAttention-3's Max_offset).
P_SCALE_LOG2 = 8.0


@dataclass(frozen=True)
class ScaledSoftmax:
    """Softmax over blocks of scores, in base 2, normalised at the end.

        y = S * scale + 8 - maximum     P = exp2(y)      O = O * alpha + P V

    The products of each block are accumulated on their own and added to O in fp32 afterwards
    (two-level accumulation), so that rescaling O by alpha costs nothing and the maximum can follow
    every block: P uses the whole range of e4m3, and none saturates.
    """

    maximum: cute.Tensor  # (2,) of S * scale, in log2
    alpha: cute.Tensor  # (2,) what the last update makes of everything before
    row_sum: cute.Tensor  # (2,) this thread's part of the sum of P, before its rounding to e4m3

    @staticmethod
    def of() -> "ScaledSoftmax":
        return ScaledSoftmax(*(cute.make_rmem_tensor(2, Float32) for _ in range(3)))

    def start(self):
        self.maximum.fill(-Float32.inf)
        self.row_sum.fill(0.0)

    @cute.jit
    def update(self, acc_S: cute.Tensor, scales: tuple):
        """S -> y in place; `scales` holds one factor > 0 per equal part of the columns, in log2."""
        rows = rows_and_columns(acc_S)  # (2, tile_n / 4)
        part = cute.size(rows, mode=[1]) // len(scales)
        for r in cutlass.range_constexpr(2):
            top = self.maximum[r]
            for g in cutlass.range_constexpr(len(scales)):
                columns = [rows[r, g * part + i] for i in range(part)]
                top = cute.arch.fmax(top, maximum_of(columns) * scales[g])
            top = cute.arch.warp_reduction_max(top, threads_in_group=4)
            base = Float32(0.0) if top == -Float32.inf else top
            self.alpha[r] = cute.math.exp2(self.maximum[r] - base, fastmath=True)
            self.maximum[r] = top
            self.row_sum[r] *= self.alpha[r]
            shift = P_SCALE_LOG2 - base
            for i in cutlass.range_constexpr(cute.size(rows, mode=[1])):
                rows[r, i] = rows[r, i] * scales[i // part] + shift

    def exponentiate(self, acc_S: cute.Tensor):
        """y -> P in place, and to the sum."""
        exponentiate(acc_S, self.row_sum)

    def factors(self, unit_change: Float32 | None, factors: cute.Tensor):
        """By what O is to be multiplied when the products of the last update's P are added."""
        for r in range(2):
            factors[r] = self.alpha[r] if unit_change is None else self.alpha[r] * unit_change

    @cute.jit
    def finish(self, lse: cute.Tensor, factors: cute.Tensor):
        """The log-sum-exp (natural log) of both rows, and by what to multiply O.

        A row that saw no key has sum 0: its O is 0, lse = -inf.
        """
        for r in cutlass.range_constexpr(2):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            is_empty = total == 0.0
            log2_sum = cute.math.log2(total, fastmath=True) - P_SCALE_LOG2
            lse[r] = -Float32.inf if is_empty else (log2_sum + self.maximum[r]) * LN2
            factors[r] = cute.arch.rcp_approx(Float32(1.0) if is_empty else total)
