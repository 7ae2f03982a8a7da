"""A consumer warpgroup of the backward kernel, of one query head: its keys, or its channels."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import warpgroup

from ...barriers import WARPGROUP
from ...scores import KeyScores
from .dq import DqSums
from .products import BwdFragments
from .rings import BwdRings


@cute.jit
def differentiate(
    frag: BwdFragments,
    rings: BwdRings,
    q: Any,
    do: Any,
    blocks: Any,
    scores: KeyScores,
    dq_sums: DqSums | None,
    thread: Int32,
    buffer: Int32,
):
    """dK and dV of 64 keys, dQ to memory, as far as they are wanted.

    dQ is a step late: that of a block is multiplied when the next block's dS is written.  So a
    warpgroup needs what the other one wrote a step before, which is there, and computes while the
    other one multiplies.  The first step's product is of no block and is dropped: a branch around a
    product would cost more.

    buffer: of dS of the next step; the one after it takes the other.

    One wgmma.fence serves the products that follow each other: what they use is ready by then.  S
    and dP follow those of the step before: threads had read theirs by then.  The last dQ needs
    none, as no thread has used its registers before.
    """
    plan, own = frag.plan, thread // WARPGROUP
    with_dq, with_dkv = plan.signature.with_dq, plan.signature.with_dkv
    dv_early = plan.config.dv_early and with_dkv
    for phase in blocks.phases():
        m_block = phase.m_end - 1
        while m_block >= phase.m_begin:
            query = q.wait_and_advance()
            frag.issue_scores(query.index)
            dout = do.wait_and_advance()
            frag.issue_dp(dout.index)
            warpgroup.wait_group(1)
            acc_P = _exponentiate(frag, rings, scores, query.index, m_block, phase.is_masked)
            p = frag.hand_over_p(acc_P, query.index, thread)
            if cutlass.const_expr(dv_early):
                warpgroup.fence()
                frag.issue_dv(p, dout.index)
            warpgroup.wait_group(0 + dv_early)
            delta = _delta(frag, rings, scores, dout.index)
            frag.differentiate(delta)
            ds = frag.rounded_ds()
            if cutlass.const_expr(with_dq):
                plan.barriers.wait_for_ds(own, buffer)
                frag.write_ds(ds, buffer, thread)
            warpgroup.fence()
            if cutlass.const_expr(with_dq):
                acc_dQ = frag.new_dq()
                frag.issue_dq(acc_dQ, 1 - buffer)
            if cutlass.const_expr(not dv_early):
                frag.issue_dv(p, dout.index)
            frag.issue_dk(ds, query.index)
            if cutlass.const_expr(with_dq):
                warpgroup.wait_group(0 + with_dkv)
                buffer = 1 - buffer
                plan.barriers.hand_on_ds(own, buffer)
                dq_sums.add(acc_dQ, m_block + 1, is_made=m_block + 1 < blocks.m_max)
            else:
                cute.arch.sync_warp()  # all lanes have read lse: one releases for them
            warpgroup.wait_group(0)
            query.release()  # and dO: load()
            m_block -= 1
    if cutlass.const_expr(with_dq):
        if blocks.m_min < blocks.m_max:
            plan.barriers.wait_for_ds(own, buffer)
            acc_dQ = frag.new_dq()
            frag.issue_dq(acc_dQ, 1 - buffer)
            warpgroup.wait_group(0)
            buffer = 1 - buffer
            plan.barriers.hand_on_ds(own, buffer)
            dq_sums.add(acc_dQ, blocks.m_min)
    return q, do, buffer


@cute.jit
def differentiate_channels(
    frag: BwdFragments,
    rings: BwdRings,
    q: Any,
    do: Any,
    blocks: Any,
    scores: KeyScores,
    dq_sums: DqSums | None,
    thread: Int32,
):
    """The same of all keys of the tile and half of the channels of dK, dV and dQ.

    P and dS go through shared memory, to buffers that have the indices of the stages of Q.
    """
    plan, with_dq = frag.plan, frag.plan.signature.with_dq
    for phase in blocks.phases():
        m_block = phase.m_end - 1
        while m_block >= phase.m_begin:
            query = q.wait_and_advance()
            frag.issue_scores(query.index)
            dout = do.wait_and_advance()
            frag.issue_dp(dout.index)
            warpgroup.wait_group(1)
            acc_P = _exponentiate(frag, rings, scores, query.index, m_block, phase.is_masked)
            p = frag.hand_over_p(acc_P, query.index, thread)
            warpgroup.wait_group(0)
            frag.differentiate(_delta(frag, rings, scores, dout.index))
            ds = frag.hand_over_ds(query.index, thread)
            cute.arch.fence_view_async_shared()
            plan.barriers.ds_written()
            warpgroup.fence()
            frag.issue_dv(p, dout.index)
            frag.issue_dk(ds, query.index)
            if cutlass.const_expr(with_dq):
                acc_dQ = frag.new_dq()
                frag.issue_dq(acc_dQ, query.index)
            warpgroup.wait_group(0 + with_dq)
            query.release()  # and dO: load()
            if cutlass.const_expr(with_dq):
                warpgroup.wait_group(0)
                dq_sums.add(acc_dQ, m_block)
            m_block -= 1
    return q, do


def _exponentiate(
    frag: BwdFragments, rings: BwdRings, scores: KeyScores, stage, m_block, is_masked: bool
) -> cute.Tensor:
    """P of the scores."""
    lse = rings.q.of_thread(stage, scores.mask.column, frag.plan.config.score_columns)
    scores.apply(frag.acc_S, m_block, is_masked)
    return scores.exponentiate(frag.acc_S, lse)


def _delta(frag: BwdFragments, rings: BwdRings, scores: KeyScores, stage) -> cute.Tensor | None:
    """Of this thread's columns, if dP is not less it already."""
    config = frag.plan.config
    if config.delta_in_parts:
        return None
    return rings.do.of_thread(stage, scores.mask.column, config.score_columns)
