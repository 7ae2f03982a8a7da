"""BwdWork: the tiles of a CTA of the backward kernel, and what each of them is about."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...blocks import Window
from ...query_blocks import QueryRange
from ...scheduler import Schedule, WorkTile
from ...sequence import RaggedSequences, Sequence, Sequences
from ...tensors import TmaOperand
from .dq import DqSums
from .plan import BwdPlan


@dataclass(frozen=True)
class BwdTensors:
    """Global tensors with the tiled modes first; heads of k and v are fewer under GQA."""

    q: TmaOperand  # (s_q, d, h_q, b)
    k: TmaOperand  # (s_k, d, h_k, b)
    v: TmaOperand  # (s_k, dv, h_k, b)
    do: TmaOperand  # (s_q, dv, h_q, b)
    dk: TmaOperand  # (s_k, d, h_k, b)
    dv: TmaOperand  # (s_k, dv, h_k, b)
    row_stats: cute.Tensor  # (2 * tile_m, m_blocks, h_q, b) fp32
    dq_sums: cute.Tensor | None  # (tile_m * tile_d, m_blocks, h_q, b) fp32
    dq_counters: cute.Tensor | None  # (warpgroups, m_blocks, h_q, b) Int32
    lengths: Any  # lengths.GivenLengths, of ragged sequences

    @property
    def tma_atoms(self) -> list[cute.CopyAtom]:
        operands = self.q, self.k, self.v, self.do, self.dk, self.dv
        return [operand.atom for operand in operands]


@dataclass(frozen=True)
class BwdScalars:
    """Run-time numbers of a backward pass."""

    softmax_scale: Float32
    scale_log2: Float32  # as in FwdScalars
    softcap_log2: Float32 | None  # the same, with softcap
    window_left: Int32
    window_right: Int32


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

    plan: cutlass.Constexpr[BwdPlan]
    schedule: Schedule
    sequences: Sequences | RaggedSequences
    scalars: BwdScalars
    heads_per_group: Any
    num_n_blocks: Any  # of equal lengths
    stats: cute.Tensor  # BwdTensors.row_stats
    sums: cute.Tensor | None  # BwdTensors.dq_sums
    counters: cute.Tensor | None  # BwdTensors.dq_counters

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
            n_block = self.num_n_blocks - 1 - n_block
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
        """lse and delta of a query head, (tile_m, m_blocks) each."""
        tile_m = self.plan.config.tile_m
        queries = self.sequence_of(tile).queries
        both = queries.workspace(self.stats, head, tile_m)  # (2 * tile_m, m_blocks)
        layout = cute.make_layout((tile_m, both.shape[1]), stride=both.stride)
        return tuple(cute.make_tensor(both.iterator + i * tile_m, layout) for i in range(2))

    def dq_sums(self, tile: KeyTile, head, thread, buffer: cute.Tensor | None) -> DqSums | None:
        """Those of a query head, if dQ is wanted."""
        if self.sums is None:
            return None
        queries, tile_m = self.sequence_of(tile).queries, self.plan.config.tile_m
        sums, counters = (
            None if x is None else queries.workspace(x, head, tile_m)
            for x in (self.sums, self.counters)
        )
        window = self.window_of(tile)
        return DqSums(self.plan, sums, counters, window, tile.n_block, thread, buffer)
