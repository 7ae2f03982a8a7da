"""Which tiles a persistent CTA computes, in which order.

    order    causal and local tiles differ in length: longest first, so that the last wave of a
             round is made of short ones (LPT).  Within a length, heads follow each other.
    rounds   heads are taken in groups whose K and V fit in L2 together; a group is a round.
    deal     a round is dealt to the CTAs like cards, back and forth (0..G-1, G-1..0, ...), so that
             no CTA gets the longer tile of every wave.  Every round starts at CTA 0 again: were the
             deal to run on, the long tiles of the next round would fall to whom the short ones of
             this one did not reach, and always to the same.

Without a mask all tiles are equal: head after head, one round.

Plain arithmetic: runs on Python ints (tests) and on the DSL's Int32 (kernels).

Tiles of a ragged batch are dealt on the device (simple/schedule.py), and TileList reads the result.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute

from .arithmetic import clamp, maximum, minimum
from .ctas import MAX_CTAS

L2_BUDGET = 32 << 20  # bytes of K and V that may live in L2 at once; H100 has 50 MiB
MIN_WAVES = 2  # of a round: a long tile of the first is made up for by a short one of the second
ENTRY = 4  # int32 per tile of a TileList: one load
FIRST_ENTRY = MAX_CTAS + ENTRY  # int32 ahead of them: where each CTA's tiles begin, and all end


@dataclass(frozen=True)
class WorkTile:
    m_block: Any
    head: Any  # of q
    head_kv: Any
    batch: Any
    turn: Any = 0  # its index among the tiles of its CTA
    is_valid: Any = True  # otherwise there is none, and the CTA is done


@dataclass(frozen=True)
class TileOrder:
    """The order of all tiles: position -> WorkTile."""

    longest_first: cutlass.Constexpr[bool]
    num_m_blocks: Any
    num_heads: Any
    num_heads_kv: Any
    num_batches: Any
    heads_per_group: Any  # (batch, head) pairs that run side by side
    count: Any  # of all tiles: computed once, on the host
    counter: cute.Pointer | None = None  # of a dynamic schedule (sm90/tile_queue.py)
    cluster: cutlass.Constexpr[int] = 1  # CTAs that get as many tiles of a head, one each

    @staticmethod
    def of(
        longest_first, num_m_blocks, num_heads, num_heads_kv, num_batches, heads_per_group, **more
    ):
        sizes = num_m_blocks, num_heads, num_heads_kv, num_batches
        count = num_m_blocks * num_heads * num_batches
        return TileOrder(longest_first, *sizes, heads_per_group, count, **more)

    @staticmethod
    def group_of(key_bytes, s_k, num_m_blocks, num_heads, num_heads_kv, num_batches, num_ctas):
        """heads_per_group for masks that make tiles unequal.

        As many as fit in L2 (key_bytes: K and V of one key), but about MIN_WAVES waves at least;
        rather a little less, as tiles left over make a third wave of few.
        """
        fitting = maximum(L2_BUDGET // key_bytes // s_k, 1) * (num_heads // num_heads_kv)
        filling = MIN_WAVES * num_ctas // num_m_blocks
        return minimum(maximum(fitting, filling), num_heads * num_batches)

    def deal(self, cta, num_ctas) -> "Deal | ClusterDeal":
        if self.cluster == 1:
            return Deal(cta, num_ctas, self.count, self.tiles_per_round)
        sizes = num_ctas, self.count, self.tiles_per_round
        of_cluster = Deal(cta // self.cluster, *(size // self.cluster for size in sizes))
        return ClusterDeal(of_cluster, self.cluster, cta % self.cluster)

    @property
    def num_tiles(self):
        return self.count

    @property
    def tiles_per_round(self):
        """Positions that are dealt together; at least one per CTA."""
        return self.heads_per_group * self.num_m_blocks if self.longest_first else self.count

    def __getitem__(self, position) -> WorkTile:
        group_tiles = self.heads_per_group * self.num_m_blocks
        group = position // group_tiles
        first_head = group * self.heads_per_group
        heads_left = self.num_heads * self.num_batches - first_head
        heads = maximum(minimum(heads_left, self.heads_per_group), 1)  # none beyond the end
        place = position - group * group_tiles
        rank = place // heads
        pair = first_head + place - rank * heads  # batch * num_heads + head
        m_block = self.num_m_blocks - 1 - rank if self.longest_first else rank
        batch = pair // self.num_heads
        head = pair - batch * self.num_heads
        return WorkTile(m_block, head, head // (self.num_heads // self.num_heads_kv), batch)


@dataclass(frozen=True)
class TileList:
    """The tiles of a ragged batch: position -> WorkTile.

    Those of a CTA are together; of a dynamic schedule they are in the order in which CTAs get them.
    """

    # (MAX_CTAS + 1,) int32: a CTA's first position; the next CTA's ends it, and the last number is
    # that of all tiles.  Of a dynamic schedule the first one is its counter.
    begins: cute.Tensor
    entries: cute.Tensor  # (tiles + 1, ENTRY) int32: batch, m_block, head, head_kv

    @staticmethod
    def of(memory: cute.Tensor, num_tiles) -> "TileList":
        """memory: int32, as simple/schedule.py lays it out; num_tiles: that there is room for."""
        entries = cute.make_layout((num_tiles + 1, ENTRY), stride=(ENTRY, 1))
        return TileList(
            cute.make_tensor(memory.iterator, cute.make_layout(MAX_CTAS + 1)),
            cute.make_tensor(memory.iterator + FIRST_ENTRY, entries),
        )

    @property
    def count(self):
        """More CTAs than this have nothing to do, or no place in the list."""
        return minimum(self.entries.shape[0] - 1, MAX_CTAS)

    @property
    def num_tiles(self):
        return self.begins[MAX_CTAS]

    @property
    def counter(self) -> cute.Pointer:
        return self.begins.iterator

    def deal(self, cta, num_ctas) -> "Share":
        return Share(self.begins[cta], self.begins[cta + 1])

    def __getitem__(self, position) -> WorkTile:
        entry = cute.make_rmem_tensor(ENTRY, cutlass.Int32)
        cute.autovec_copy(self.entries[position, None], entry)
        batch, m_block, head, head_kv = (entry[i] for i in range(ENTRY))
        return WorkTile(m_block, head, head_kv, batch)


@dataclass(frozen=True)
class Share:
    """The positions of one CTA in a TileList: index -> position."""

    begin: Any
    end: Any

    def __getitem__(self, index):
        return self.begin + index


@dataclass(frozen=True)
class Deal:
    """The positions of one CTA: index -> position."""

    cta: Any
    num_ctas: Any
    num_tiles: Any
    tiles_per_round: Any

    @property
    def end(self):
        return self.num_tiles

    def __getitem__(self, index):
        share = self._share(self.tiles_per_round)
        turn = minimum(index // maximum(share, 1), self.num_tiles // self.tiles_per_round)
        wave = index - turn * share
        return turn * self.tiles_per_round + wave * self.num_ctas + self._slot(wave)

    def _slot(self, wave):
        """This CTA's place in a wave; every second wave is dealt backwards."""
        odd = wave % 2
        return self.cta + odd * (self.num_ctas - 1 - 2 * self.cta)

    def _share(self, tiles):
        """How many of the tiles dealt in one round come to this CTA."""
        full_waves = tiles // self.num_ctas
        rest = tiles - full_waves * self.num_ctas
        return full_waves + clamp(rest - self._slot(full_waves), 0, 1)


@dataclass(frozen=True)
class ClusterDeal:
    """The positions of one CTA of a cluster, which is dealt `size` at a time: index -> position.

    As many tiles follow each other within a head, those that do not exist among them.
    """

    of_cluster: Deal
    size: cutlass.Constexpr[int]
    rank: Any

    @property
    def end(self):
        return self.of_cluster.end * self.size

    def __getitem__(self, index):
        return self.of_cluster[index] * self.size + self.rank


@dataclass(frozen=True)
class Schedule:
    """The tiles of one CTA, one after another: first(), then next() while they are valid."""

    order: TileOrder | TileList
    deal: Deal | ClusterDeal | Share

    @staticmethod
    def of(order: TileOrder | TileList, cta, num_ctas) -> "Schedule":
        return Schedule(order, order.deal(cta, num_ctas))

    def first(self) -> WorkTile:
        return self.at(0)

    def fetch(self) -> None:
        """Nothing: which tile is next is known."""

    def next(self, tile: WorkTile, fetched: None = None) -> WorkTile:
        return self.at(tile.turn + 1)

    def at(self, turn) -> WorkTile:
        """The turn-th tile.  Beyond its last tile a CTA is dealt a position from `end` on."""
        position = self.deal[turn]
        return replace(self.order[position], turn=turn, is_valid=position < self.deal.end)
