"""BwdWork: the tiles of a CTA of the backward kernel, and what each of them is about."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .blocks import Window
from .bwd_arguments import BwdArguments
from .query_blocks import QueryRange
from .scheduler import Schedule, WorkTile
from .sequence import RaggedSequences, Sequence, Sequences


@dataclass(frozen=True)
class BwdScalars:
    """Run-time numbers of a backward pass."""

    softmax_scale: Float32
    scale_log2: Float32  # as in FwdScalars
    softcap_log2: Float32 | None  # the same, with softcap
    window_left: Int32
    window_right: Int32

    @staticmethod
    def of(x: BwdArguments) -> "BwdScalars":
        return BwdScalars(
            x.softmax_scale, x.scale_log2, x.softcap_log2, x.window_left, x.window_right
        )


@dataclass(frozen=True)
class KeyTile:
    """The keys of a tile, of one key head."""

    n_block: Any
    head_kv: Any
    batch: Any
    turn: Any
    is_valid: Any


@dataclass(frozen=True)
class BwdWork:
    """The tiles of this CTA, one after another, and what each of them is about."""

    plan: cutlass.Constexpr[Any]  # signature, config
    schedule: Schedule
    sequences: Sequences | RaggedSequences
    scalars: BwdScalars
    heads_per_group: Any
    stats: cute.Tensor  # BwdTensors.row_stats
    parts: cute.Tensor | None  # BwdTensors.delta_parts
    sums: cute.Tensor | None  # BwdTensors.dq_sums
    counters: cute.Tensor | None  # BwdTensors.dq_counters

    @staticmethod
    def of(plan, tensors: Any, q, k, scalars: BwdScalars, schedule: Schedule) -> "BwdWork":
        """tensors: with BwdTensors' row_stats and what follows it; q, k: (rows, d, heads, b)."""
        return BwdWork(
            plan,
            schedule,
            plan.lengths.sequences(q.shape[0], k.shape[0], tensors.lengths),
            scalars,
            q.shape[2] // k.shape[2],
            tensors.row_stats,
            tensors.delta_parts,
            tensors.dq_sums,
            tensors.dq_counters,
        )

    def first(self) -> KeyTile:
        return self._of(self.schedule.first())

    def next(self, tile: KeyTile) -> KeyTile:
        return self._of(self.schedule.next(tile))

    def at(self, turn) -> KeyTile:
        return self._of(self.schedule.at(turn))

    def _of(self, tile: WorkTile) -> KeyTile:
        """Longest first: a TileOrder counts down, and the first keys are seen most."""
        n_block = tile.m_block
        if self.plan.signature.mask != "full" and not self.plan.signature.is_ragged:
            n_block = self.schedule.order.num_m_blocks - 1 - n_block
        return KeyTile(n_block, tile.head, tile.batch, tile.turn, tile.is_valid)

    def sequence_of(self, tile: KeyTile) -> Sequence:
        return self.sequences[tile.batch]

    def window_of(self, tile: KeyTile) -> Window:
        left, right = self.scalars.window_left, self.scalars.window_right
        return self.sequence_of(tile).window(self.plan.signature.mask, left, right)

    def blocks_of(self, tile: KeyTile) -> QueryRange:
        config, window = self.plan.config, self.window_of(tile)
        return QueryRange.of(window, tile.n_block, tile_m=config.tile_m, tile_n=config.tile_n)

    def row_stats(self, tile: KeyTile, head) -> tuple[cute.Tensor, cute.Tensor]:
        """lse and delta of a query head, (tile_m, m_blocks) each; or delta's parts, as they lie."""
        tile_m = self.plan.config.tile_m
        queries = self.sequence_of(tile).queries
        both = queries.workspace(self.stats, head, tile_m)  # (2 * tile_m, m_blocks)
        layout = cute.make_layout((tile_m, both.shape[1]), stride=both.stride)
        lse, delta = (cute.make_tensor(both.iterator + i * tile_m, layout) for i in range(2))
        if self.parts is not None:
            delta = queries.workspace(self.parts, head, tile_m)  # (8 * tile_m, m_blocks)
        return lse, delta

    def dq_sums(self, tile: KeyTile, head) -> tuple[cute.Tensor | None, cute.Tensor | None]:
        """Sums and counters of a query head, where there are some: (numbers, m_blocks) each."""
        queries, tile_m = self.sequence_of(tile).queries, self.plan.config.tile_m
        return tuple(
            None if x is None else queries.workspace(x, head, tile_m)
            for x in (self.sums, self.counters)
        )
