"""QueryRange: which query blocks a key tile visits, and which of them need a mask.

The transpose of BlockRange, and as that plain arithmetic on non-negative divisions only.
"""

from dataclasses import dataclass
from typing import Any

from .arithmetic import ceil_div, clamp, maximum
from .blocks import Window
from .signature import MaskKind


@dataclass(frozen=True)
class QueryPhase:
    """Blocks m_begin <= m < m_end, visited downwards."""

    m_begin: Any
    m_end: Any
    is_masked: bool  # compile-time


@dataclass(frozen=True)
class QueryRange:
    """Query blocks of one key tile, visited from m_max - 1 down to m_min; there may be none.

        m_min <= m_diagonal <= m_edge <= m_max
        |  diagonal  |  interior  |  edge  |
           masked       no mask     masked

    A tile that holds the end of the keys within it needs a mask for every block: all are diagonal.
    Rows beyond the last query need none: their lse is infinite, so that P is 0.
    """

    kind: MaskKind  # compile-time
    m_min: Any
    m_diagonal: Any
    m_edge: Any
    m_max: Any

    @staticmethod
    def of(window: Window, n_block, tile_m: int, tile_n: int) -> "QueryRange":
        s_q = window.s_q
        first_key = n_block * tile_n
        missing = clamp(first_key + tile_n - window.s_k, 0, tile_n)  # keys, in the last tile
        last_key = first_key + tile_n - 1 - missing
        m_min, m_diagonal = 0, 0
        m_max = ceil_div(s_q, tile_m)
        m_edge = m_max
        if window.kind != "full":
            begin = clamp(first_query(window, first_key), 0, s_q)
            begin_for_all = clamp(first_query(window, last_key), 0, s_q)
            if window.kind == "local":
                end = clamp(end_query(window, last_key), 0, s_q)
                end_for_all = clamp(end_query(window, first_key), 0, s_q)
                m_max = ceil_div(end, tile_m)
                m_edge = end_for_all // tile_m
            m_min = begin // tile_m
            m_max = maximum(m_max, m_min)
            m_diagonal = ceil_div(begin_for_all, tile_m)
        is_cut = clamp(missing, 0, 1)
        m_diagonal = clamp(m_diagonal, m_min, m_max)
        m_diagonal += is_cut * (m_max - m_diagonal)
        m_edge = clamp(m_edge, m_diagonal, m_max)
        return QueryRange(window.kind, m_min, m_diagonal, m_edge, m_max)

    @property
    def count(self):
        """Blocks visited; 0 where no query sees a key of the tile."""
        return self.m_max - self.m_min

    def phases(self) -> tuple[QueryPhase, ...]:
        """Which phases exist is known at compile time."""
        diagonal = QueryPhase(self.m_min, self.m_diagonal, True)
        interior = QueryPhase(self.m_diagonal, self.m_edge, False)
        edge = QueryPhase(self.m_edge, self.m_max, True)
        return (edge, interior, diagonal) if self.kind == "local" else (interior, diagonal)


def first_tile(window: Window, m_block, tile_m: int, tile_n: int):
    """The first of the key tiles that visit a query block: they follow each other."""
    if window.kind != "local":
        return 0
    return clamp(window.first_key(m_block * tile_m), 0, window.s_k) // tile_n


def first_query(window: Window, key):
    """The first query that may see `key` (may be negative, or beyond s_q)."""
    right = 0 if window.kind == "causal" else window.right
    return key - window.shift - right


def end_query(window: Window, key):
    """One past the last query that may see `key` (may be negative, or beyond s_q)."""
    return key - window.shift + window.left + 1
