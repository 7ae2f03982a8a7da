"""Work: the tiles of one CTA, one after another, and what each of them is about."""

from dataclasses import dataclass, replace
from typing import Any

import cutlass

from .blocks import BlockRange, Window
from .scheduler import Schedule, WorkTile
from .sequence import RaggedSequences, Sequence, Sequences
from .tensors import FwdScalars


@dataclass(frozen=True)
class Work:
    plan: cutlass.Constexpr[Any]  # signature, tile_m, tile_n
    schedule: Schedule
    sequences: Sequences | RaggedSequences
    scalars: FwdScalars

    def first(self) -> WorkTile:
        return self.schedule.first()

    def next(self, tile: WorkTile) -> WorkTile:
        return self.schedule.next(tile)

    def again(self, tile: WorkTile) -> WorkTile:
        """The same, looked up anew: that of a ragged batch has needed no registers meanwhile."""
        return self.schedule.next(replace(tile, turn=tile.turn - 1))

    def sequence_of(self, tile: WorkTile) -> Sequence:
        return self.sequences[tile.batch]

    def window_of(self, tile: WorkTile) -> Window:
        left, right = self.scalars.window_left, self.scalars.window_right
        return self.sequence_of(tile).window(self.plan.signature.mask, left, right)

    def blocks_of(self, tile: WorkTile) -> BlockRange:
        plan, window = self.plan, self.window_of(tile)
        return BlockRange.of(window, tile.m_block, tile_m=plan.tile_m, tile_n=plan.tile_n)
