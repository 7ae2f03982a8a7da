"""Work: the tiles of one CTA, one after another, and what each of them is about."""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
from cutlass import Float32

from .arithmetic import ceil_div, minimum
from .blocks import BlockRange, Window
from .scheduler import Schedule, WorkTile
from .sequence import RaggedSequences, Sequence, Sequences
from .tensors import FwdScalars, FwdTensors


@dataclass(frozen=True)
class Work:
    plan: cutlass.Constexpr[Any]  # signature, tile_m, tile_n
    schedule: Schedule
    sequences: Sequences | RaggedSequences
    scalars: FwdScalars

    def first(self) -> WorkTile:
        return self.schedule.first()

    def fetch(self) -> Any:
        """By the producer, once a tile, for next()."""
        return self.schedule.fetch()

    def next(self, tile: WorkTile, *fetched) -> WorkTile:
        return self.schedule.next(tile, *fetched)

    def again(self, tile: WorkTile) -> WorkTile:
        """The same, looked up anew: that of a ragged batch has needed no registers meanwhile."""
        return self.schedule.next(replace(tile, turn=tile.turn - 1))

    def sequence_of(self, tile: WorkTile) -> Sequence:
        """Of a split that gets no block it is one without keys."""
        sequence = self.sequences[tile.batch]
        if self.scalars.num_splits is None:
            return sequence
        return sequence.hiding_keys(self._split_of(tile) >= self._all_blocks_of(tile).count)

    def window_of(self, tile: WorkTile) -> Window:
        return self._window_of(self.sequence_of(tile))

    def blocks_of(self, tile: WorkTile) -> BlockRange:
        blocks, num_splits = self._all_blocks_of(tile), self.scalars.num_splits
        return blocks if num_splits is None else blocks.split(self._split_of(tile), num_splits)

    def query_block_of(self, tile: WorkTile):
        """Which block of q is loaded: the last one where a cluster's last tile has no rows."""
        tiling = self.plan.tiling
        if tiling.cluster == 1:
            return tile.m_block
        num_blocks = ceil_div(self.sequence_of(tile).s_q, tiling.size)
        return minimum(tile.m_block, num_blocks - 1)

    def head_of(self, tile: WorkTile):
        """The head of q. A tile's own head is that of its results: each split has one."""
        num_splits = self.scalars.num_splits
        return tile.head if num_splits is None else tile.head // num_splits

    def sink_of(self, tile: WorkTile, tensors: FwdTensors) -> Float32 | None:
        """Of a head's splits the first one has it in its sum."""
        sink = tensors.sink_of(replace(tile, head=self.head_of(tile)))
        if sink is None or self.scalars.num_splits is None:
            return sink
        return cutlass.select_(self._split_of(tile) == 0, sink, -Float32.inf)

    def _split_of(self, tile: WorkTile):
        return tile.head - self.head_of(tile) * self.scalars.num_splits

    def _window_of(self, sequence: Sequence) -> Window:
        x = self.scalars
        kind = self.plan.signature.mask
        return sequence.window(kind, x.window_left, x.window_right, x.rows_per_query)

    def _all_blocks_of(self, tile: WorkTile) -> BlockRange:
        """Those of all splits."""
        plan, window = self.plan, self._window_of(self.sequences[tile.batch])
        return BlockRange.of(window, tile.m_block, tile_m=plan.tile_m, tile_n=plan.tile_n)
