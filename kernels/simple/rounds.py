"""In which order the tiles of a ragged batch are dealt, and what that needs of memory.

Plain arithmetic: runs on Python ints (tests, sizes of memory) and on the DSL's Int32 (schedule.py).
"""

from dataclasses import dataclass
from typing import Any

import cutlass

from ..arithmetic import ceil_div, clamp, maximum, minimum
from ..scheduler import ENTRY, FIRST_ENTRY
from ..signature import MaskKind

CLASSES = 32  # of costs
LINEAR = 16  # of them by steps of 1/16 of a CTA's share of all work; each one below halves the cost
ALONE = LINEAR  # up to this class
MAX_CHUNKS = 128
# A round is so many times as long as its longest tile, or longer; causal ones end with short tiles.
ROUND_PER_TILE = {"full": 3, "causal": 2, "local": 3}
ITEMS_PER_ROUND = 2  # of a CTA, at least


@dataclass(frozen=True)
class Slots:
    """A place for every pair (sequence, block), found without a pass over the lengths.

    Some stay empty: sequences are shorter than there is room for.
    """

    tile: cutlass.Constexpr[int]  # rows of a block
    per_sequence: Any  # slots that a sequence has besides those for its packed rows
    count: Any

    @staticmethod
    def of(tile: int, num_sequences, rows, is_packed) -> "Slots":
        """rows: of a packed tensor (is_packed: 1), or of each sequence of a dense one (0)."""
        per_sequence = ceil_div(rows, tile) * (1 - is_packed) + is_packed
        count = per_sequence * num_sequences + rows // tile * is_packed
        return Slots(tile, per_sequence, count)

    def first(self, batch, start):
        return start // self.tile + batch * self.per_sequence


@dataclass(frozen=True)
class Memory:
    """Where what lies in the scratch memory, in int32."""

    num_slots: Any
    num_heads: Any

    @property
    def num_tiles(self):
        """At most."""
        return self.num_slots * self.num_heads

    @property
    def items(self):
        return FIRST_ENTRY + (self.num_tiles + 1) * ENTRY

    @property
    def pairs(self):
        return self.items + self.num_tiles * ENTRY

    @property
    def order(self):
        return self.pairs + self.num_slots * ENTRY

    @property
    def size(self):
        return self.order + self.num_slots * 2


def capacity(tile: int, num_sequences: int, rows: int, num_heads: int, is_packed: bool) -> int:
    """int32 of scratch memory, aligned to 16 bytes, for any lengths.

    rows: of the packed tensor that is cut into tiles, or of each sequence of a dense one.
    """
    slots = Slots.of(tile, num_sequences, rows, int(is_packed))
    return Memory(slots.count, num_heads).size


@dataclass(frozen=True)
class Totals:
    """Of all pairs."""

    work: Any  # the sum of their costs
    longest: Any  # the highest cost
    shared: Any  # rows that tiles share, of all sequences that have tiles
    longest_shared: Any


@dataclass(frozen=True)
class Rounds:
    """All tiles: chunk after chunk of slots, in it group after group of heads."""

    num_chunks: Any
    slots_per_chunk: Any
    num_groups: Any
    heads_per_group: Any
    unit: Any  # of cost: a step between classes

    @staticmethod
    def of(
        mask: MaskKind, totals: Totals, num_slots, num_heads, num_heads_kv, num_ctas, rows_in_l2
    ) -> "Rounds":
        work, longest = totals.work, maximum(totals.longest, 1)
        share = work // num_ctas * num_heads + work % num_ctas * num_heads // num_ctas
        most = maximum(share // (ROUND_PER_TILE[mask] * longest), 1)
        rows = maximum(rows_in_l2, ceil_div(totals.shared, most) * num_heads_kv)  # of a round
        heads_kv = clamp(rows // maximum(totals.longest_shared, 1), 1, num_heads_kv)
        num_groups = ceil_div(num_heads_kv, heads_kv)
        heads_kv = ceil_div(num_heads_kv, num_groups)
        num_chunks = clamp(ceil_div(totals.shared * heads_kv, rows), 1, MAX_CHUNKS)
        slots_per_chunk = ceil_div(num_slots, num_chunks)
        return Rounds(
            num_chunks=ceil_div(num_slots, slots_per_chunk),
            slots_per_chunk=slots_per_chunk,
            num_groups=num_groups,
            heads_per_group=heads_kv * (num_heads // num_heads_kv),
            unit=maximum(ceil_div(share, LINEAR), 1),
        )

    def class_of(self, cost):
        """0 is the longest."""
        below = self.unit // maximum(cost, 1)
        halvings = sum(minimum(below >> i, 1) for i in range(1, CLASSES - LINEAR))
        return LINEAR - minimum(cost // self.unit, LINEAR) + halvings


@dataclass(frozen=True)
class Run:
    """Pairs of a round that are dealt alike, as items: a few heads of a pair at once.

    Tiles down to 1/32 of a CTA's share go alone, in one run; shorter ones have a run per class.
    """

    num_pairs: Any
    first_head: Any
    heads: Any
    heads_at_once: Any

    @staticmethod
    def of(cost_class, num_pairs, first_head, heads, tiles_of_round, num_ctas) -> "Run":
        halvings = maximum(cost_class - ALONE, 0)
        fitting = minimum(1 << halvings, tiles_of_round // (ITEMS_PER_ROUND * num_ctas))
        return Run(num_pairs, first_head, heads, clamp(fitting, 1, heads))

    @staticmethod
    def end_class(cost_class):
        """One past the last class in the run of this one."""
        return maximum(cost_class, ALONE) + 1

    @property
    def parts(self):
        """Items of a pair."""
        return ceil_div(self.heads, self.heads_at_once)

    @property
    def num_items(self):
        return self.num_pairs * self.parts

    def heads_of(self, part):
        """First head and number of heads."""
        head = part * self.heads_at_once
        return self.first_head + head, minimum(self.heads - head, self.heads_at_once)
