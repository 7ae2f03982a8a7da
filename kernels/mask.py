"""Mask: which elements of a score tile count."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .arithmetic import minimum
from .blocks import Window
from .views import column_of, rows_and_columns


@dataclass(frozen=True)
class Mask:
    """The mask of one query tile, as one thread sees it."""

    window: Window
    tile_n: int
    row: Any  # query of this thread's first row; the second one is 8 below
    column: Any  # this thread's first column in a tile, 2 (lane % 4)

    def apply(self, acc_S: cute.Tensor, n_block: Int32):
        """Set the scores of keys that the row does not see to -inf."""
        scores = rows_and_columns(acc_S)  # (2, tile_n / 4)
        first_column = n_block * self.tile_n + self.column
        for r in range(2):
            row = self.row + 8 * r
            begin, end = self._bounds(row, first_column)
            keep(scores[r, None], begin, end)

    def _bounds(self, row, first_column):
        """Visible columns [begin, end) relative to first_column; begin None: no left bound."""
        window = self.window
        if window.kind == "full":
            return None, window.s_k - first_column
        if window.kind == "causal":
            return None, window.end_key(row) - first_column
        row = minimum(row, window.s_q - 1)  # rows beyond the last one must see some key too
        end = minimum(window.end_key(row), window.s_k)
        return window.first_key(row) - first_column, end - first_column


@cute.jit
def keep(scores: cute.Tensor, begin, end):
    """Set the scores of a row outside of columns [begin, end) to -inf; one of them may be None."""
    for i in cutlass.range_constexpr(cute.size(scores)):
        column = column_of(i)
        if cutlass.const_expr(end is None):
            is_visible = column >= begin
        else:
            is_visible = column < end
            if cutlass.const_expr(begin is not None):
                is_visible = is_visible and column >= begin
        scores[i] = scores[i] if is_visible else -Float32.inf
