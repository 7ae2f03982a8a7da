"""What tiles are: blocks of queries in the forward pass, blocks of keys in the backward pass.

Plain arithmetic, as blocks.py.
"""

from dataclasses import dataclass
from typing import Any

from .arithmetic import ceil_div, minimum
from .blocks import BlockRange, Window
from .ctas import HOPPER_CTAS
from .query_blocks import QueryRange
from .signature import MaskKind


def cost_of(num_blocks):
    """A tile's, in halves of a block that it visits; what each tile needs counts as three."""
    return 2 * num_blocks + 3


@dataclass(frozen=True)
class QueryTiles:
    """A tile has tile_m queries of a query head, and visits blocks of tile_n keys."""

    mask: MaskKind
    tile_m: int
    tile_n: int
    is_dynamic: bool = False  # a tile goes to the CTA that asks first (sm90/tile_queue.py)
    cluster: int = 1  # CTAs that get as many tiles of a head, one each
    max_ctas: int = HOPPER_CTAS  # that a list is dealt to, at most

    in_order = False
    has_rank = False

    @property
    def size(self) -> int:
        return self.tile_m

    def sides(self, queries, keys) -> tuple:
        """What is cut into tiles, and what tiles of a head share in L2."""
        return queries, keys

    def heads(self, x) -> tuple:
        """How many have tiles, and how many share nothing. x: the arguments of a call."""
        return x.out.shape[2], x.k.shape[2]

    def rows_per_query(self, x) -> Any:
        return x.rows_per_query

    def num_splits(self, x) -> Any:
        """Where each head of q has so many tiles that share the blocks of one; else None."""
        return x.num_splits

    def is_listed(self, x) -> Any:
        """Whether a call may bring the list of its tiles, and does."""
        return x.is_listed

    def shared_bytes(self, x) -> Any:
        """Of one row of what is shared."""
        return _row_bytes(x)

    def cost(self, window: Window, block, num_splits=None):
        blocks = BlockRange.of(window, block, tile_m=self.tile_m, tile_n=self.tile_n)
        return cost_of(blocks.count if num_splits is None else ceil_div(blocks.count, num_splits))


@dataclass(frozen=True)
class KeyTiles:
    """A tile has tile_n keys of a key head, and visits blocks of tile_m queries of its group."""

    mask: MaskKind
    tile_m: int
    tile_n: int
    in_order: bool = False  # tiles of a sequence and a head are to be dealt by ascending keys
    max_ctas: int = HOPPER_CTAS  # as that of QueryTiles

    is_dynamic = False
    cluster = 1

    @property
    def size(self) -> int:
        return self.tile_n

    def sides(self, queries, keys) -> tuple:
        return keys, queries

    def heads(self, x) -> tuple:
        return x.k.shape[2], x.k.shape[2]

    def shared_bytes(self, x) -> Any:
        return _row_bytes(x) * (x.q.shape[2] // x.k.shape[2])

    def rows_per_query(self, x) -> None:
        """A row is a query."""

    def num_splits(self, x) -> None:
        return None

    def is_listed(self, x) -> None:
        return None

    def cost(self, window: Window, block, num_splits: None = None):
        blocks = QueryRange.of(window, block, tile_m=self.tile_m, tile_n=self.tile_n)
        return cost_of(blocks.count)

    @property
    def has_rank(self) -> bool:
        """Sorted by cost they would not be in order: under a window it rises, and falls again."""
        return self.in_order and self.mask == "local"

    def rank(self, window: Window, block):
        """At least the cost of this tile and of those with higher keys, for which it is no more."""
        span = minimum(window.left, window.s_q) + minimum(window.right, window.s_q)
        seen = ceil_div(span + self.tile_n, self.tile_m) + 1
        blocks = QueryRange.of(window, block, tile_m=self.tile_m, tile_n=self.tile_n)
        return cost_of(minimum(seen, ceil_div(window.s_q, self.tile_m) - blocks.m_min))


def _row_bytes(x):
    return (x.k.shape[3] + x.v.shape[3]) * (x.k.element_type.width // 8)
