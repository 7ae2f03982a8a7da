"""BlockRange: which key blocks a query tile visits, and which of them need a mask.

Plain arithmetic on non-negative divisions only, so that the same code runs on Python ints (tests
compare it with brute force) and on the DSL's Int32 (kernels).
"""

from dataclasses import dataclass
from typing import Any

from .arithmetic import ceil_div, clamp, maximum, minimum
from .signature import MaskKind


@dataclass(frozen=True)
class Window:
    """Query i sees key j iff  i + shift - left <= j <= i + shift + right  and  0 <= j < s_k.

    `shift` = s_k - s_q aligns the last query with the last key (bottom right).  A row is a query,
    or one of several heads of it; then s_q counts rows, and shift queries.
    """

    kind: MaskKind  # compile-time; "full" reads no bound, "causal" only the right one (0)
    s_q: Any
    s_k: Any
    left: Any
    right: Any
    may_lack_keys: bool = False  # compile-time: s_k may be 0
    rows_per_query: Any = None  # heads that follow each other in the rows; None: one

    @property
    def shift(self):
        return self.s_k - self._query(self.s_q)

    def first_key(self, row):
        """The first key that the query of a row may see (may be negative)."""
        return self._query(row) + self.shift - self.left

    def end_key(self, row):
        """One past the last key that the query of a row may see (may be negative or beyond s_k)."""
        right = 0 if self.kind == "causal" else self.right
        return self._query(row) + self.shift + right + 1

    def _query(self, row):
        return row if self.rows_per_query is None else row // self.rows_per_query


@dataclass(frozen=True)
class Phase:
    """Blocks n_begin <= n < n_end, visited downwards."""

    n_begin: Any
    n_end: Any
    is_masked: bool  # compile-time


@dataclass(frozen=True)
class BlockRange:
    """Key blocks of one query tile, visited from n_max - 1 down to n_min.

    The first one visited is always masked: it holds the end of the keys.  A tile that sees no key
    visits one block, all of it masked, so that no role needs a special case.

        n_min <= n_edge <= n_diagonal <= n_max - 1
        |  edge  |  interior  |  diagonal  | first |
          masked    no mask      masked      masked
    """

    kind: MaskKind  # compile-time
    n_min: Any
    n_edge: Any
    n_diagonal: Any
    n_max: Any

    @staticmethod
    def of(window: Window, m_block, tile_m: int, tile_n: int) -> "BlockRange":
        first_row = m_block * tile_m
        last_row = minimum(first_row + tile_m, window.s_q) - 1
        n_min, n_edge = 0, 0
        n_max = ceil_div(window.s_k, tile_n)
        if window.may_lack_keys:
            n_max = maximum(n_max, 1)
        n_diagonal = n_max - 1
        if window.kind != "full":
            end = clamp(window.end_key(last_row), 0, window.s_k)
            end_for_all = clamp(window.end_key(first_row), 0, window.s_k)
            if window.kind == "local":
                n_min = clamp(window.first_key(first_row), 0, window.s_k) // tile_n
                n_edge = ceil_div(clamp(window.first_key(last_row), 0, window.s_k), tile_n)
            n_max = maximum(ceil_div(end, tile_n), n_min + 1)
            n_diagonal = clamp(end_for_all // tile_n, n_min, n_max - 1)
            n_edge = clamp(n_edge, n_min, n_diagonal)
        return BlockRange(window.kind, n_min, n_edge, n_diagonal, n_max)

    def split(self, index, num_splits) -> "BlockRange":
        """One of `num_splits` parts as long as each other, or by one block, the first keys first.

        Where there are fewer blocks than parts, those that get none visit block 0: whoever splits
        has to hide all keys from them.
        """
        length = self.count // num_splits
        longer = self.count - length * num_splits  # so many parts have one block more
        first = self.n_min + index * length + minimum(index, longer)
        n_min = first * clamp(self.count - index, 0, 1)
        n_max = n_min + maximum(length + clamp(longer - index, 0, 1), 1)
        n_diagonal = clamp(self.n_diagonal, n_min, n_max - 1)
        n_edge = clamp(self.n_edge, n_min, n_diagonal)
        return BlockRange(self.kind, n_min, n_edge, n_diagonal, n_max)

    @property
    def count(self):
        """Blocks visited; at least 1."""
        return self.n_max - self.n_min

    def phases(self) -> tuple[Phase, ...]:
        """The blocks after the first one; which phases exist is known at compile time."""
        diagonal = Phase(self.n_diagonal, self.n_max - 1, True)
        interior = Phase(self.n_edge, self.n_diagonal, False)
        edge = Phase(self.n_min, self.n_edge, True)
        return {
            "full": (interior,),
            "causal": (diagonal, interior),
            "local": (diagonal, interior, edge),
        }[self.kind]
