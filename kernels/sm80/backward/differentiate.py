"""A side's steps: a tile of keys and all queries of a head that see them."""

from dataclasses import replace

import cutlass
import cutlass.cute as cute

from ...query_blocks import QueryPhase, QueryRange
from ...scores import KeyScores
from ..copies import kept
from ..mma import ROWS
from .dq import DqSums
from .load import Loads, numbers_of_thread
from .products import Side


@cute.jit
def differentiate(
    side: Side,
    loads: Loads,
    stats: cute.Pointer,
    blocks: QueryRange,
    scores: KeyScores,
    dq_sums: DqSums | None,
    keys: cutlass.Int32,
):
    """dV or dK of one query head to registers, and a part of dQ to memory.

    stats: (tile_m, num_stages) fp32, lse or delta.  scores: of the warp's first group of keys.
    keys: which of the key_warps parts of the tile.
    """
    plan = side.plan
    for phase in _phases(blocks, side.makes_p):
        m_block = phase.m_end - 1
        while m_block >= phase.m_begin:
            stage = loads.stage(m_block)
            loads.before_scores(m_block)
            if cutlass.const_expr(side.makes_p):
                _make_p(side, stats, stage, scores, phase.is_masked, m_block)
                if cutlass.const_expr(plan.config.column_warps == 1):
                    plan.barriers.let_p_be_read(keys)
                else:
                    plan.barriers.p_written(keys)
            else:
                _make_ds(side, stats, stage, scores, keys)
                if cutlass.const_expr(plan.config.column_warps > 1):
                    plan.barriers.ds_written(keys)
            if cutlass.const_expr(plan.signature.with_dkv):
                side.add(stage)
            if cutlass.const_expr(dq_sums is not None):
                dq_sums.wait_for_turn(m_block)
            loads.after_sums(m_block)
            if cutlass.const_expr(dq_sums is not None):
                dq_sums.add(side.dq(), m_block)
            m_block -= 1


def _phases(blocks: QueryRange, makes_p: bool) -> tuple[QueryPhase, ...]:
    """Where P is 0, dS is, too: the side that makes it needs no mask."""
    return blocks.phases() if makes_p else (QueryPhase(blocks.m_min, blocks.m_max, False),)


def _make_p(side: Side, stats, stage, scores: KeyScores, is_masked: bool, m_block):
    """S = Q K^T -> P, of this warp's place."""
    for part in range(side.plan.config.score_slices):
        side.score(stage, part)
        first, lse = _numbers(side.plan, stats, stage, scores, part)
        # All bounds would be computed ahead of the loop, and spill.
        row = kept(scores.mask.row) if is_masked else scores.mask.row
        for m, group in enumerate(side.groups):
            mask = replace(scores.mask, row=row + ROWS * m, column=first)
            replace(scores, mask=mask).apply(group.scores, m_block, is_masked)
        side.exponentiate(part, scores, lse)


def _make_ds(side: Side, stats, stage, scores: KeyScores, keys):
    """dP = dO V^T -> dS, of this warp's place."""
    for part in range(side.plan.config.score_slices):
        side.score(stage, part)
        if part == 0:
            side.plan.barriers.p_written(keys)
        _, delta = _numbers(side.plan, stats, stage, scores, part)
        side.differentiate(part, delta)


def _numbers(plan, stats: cute.Pointer, stage, scores: KeyScores, part: int) -> tuple:
    """The thread's first column of a slice, and lse or delta of its columns."""
    count = plan.config.slice_columns
    first = scores.mask.column + part * count
    return first, numbers_of_thread(stats, stage, plan.config.tile_m, first, count)
