"""KeyMask: which elements of a transposed score tile count."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from .blocks import Window
from .mask import Mask, keep
from .query_blocks import end_query, first_query
from .views import rows_and_columns

NEVER = 1 << 30  # columns: a key that no query sees


@dataclass(frozen=True)
class KeyMask:
    """The mask of one key tile, as one thread sees it: its rows are keys, its columns queries."""

    window: Window
    tile_m: int
    row: Any  # key of this thread's first row; the second one is 8 below
    column: Any  # this thread's first column in a tile, 2 (lane % 4)

    def apply(self, acc_S: cute.Tensor, m_block: Int32):
        """Set the scores of queries that do not see the row's key to -inf."""
        scores = rows_and_columns(acc_S)  # (2, tile_m / 4)
        first = m_block * self.tile_m + self.column
        for r in range(2):
            begin, end = self._bounds(self.row + 8 * r, first)
            keep(scores[r, None], begin, end)

    def _bounds(self, key, first):
        """Visible columns [begin, end) relative to the query `first`; end None: no bound."""
        window, begin, end = self.window, Int32(0), None
        if window.kind != "full":
            begin = first_query(window, key) - first
        if window.kind == "local":
            end = end_query(window, key) - first
        return cutlass.select_(key < window.s_k, begin, Int32(NEVER)), end


@dataclass(frozen=True)
class QueryRows:
    """The same for scores that are not transposed: rows are queries, columns keys."""

    window: Window
    tile_m: int
    tile_n: int
    n_block: Any
    row: Any  # this thread's first row in a tile; the second one is 8 below
    column: Any  # this thread's first column in a tile, 2 (lane % 4)

    def apply(self, acc_S: cute.Tensor, m_block: Int32):
        """Set the scores of keys that the row's query does not see to -inf."""
        row = m_block * self.tile_m + self.row
        Mask(self.window, self.tile_n, row, self.column).apply(acc_S, self.n_block)
