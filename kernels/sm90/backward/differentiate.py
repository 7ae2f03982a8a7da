"""A consumer warpgroup of the backward kernel: 64 keys and all queries that see them."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import warpgroup

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
):
    """dK and dV of one query head, dQ to memory, as far as they are wanted.

    The buffers of dS, and of P, have the indices of the stages of Q.

    One wgmma.fence serves the products that follow each other: what they use is ready by then.
    """
    plan, column = frag.plan, scores.mask.column
    with_dq = plan.signature.with_dq
    dv_early = plan.config.dv_early and plan.signature.with_dkv
    for phase in blocks.phases():
        m_block = phase.m_end - 1
        while m_block >= phase.m_begin:
            query = q.wait_and_advance()
            warpgroup.fence()
            frag.issue_scores(query.index)
            dout = do.wait_and_advance()
            frag.issue_dp(dout.index)
            warpgroup.wait_group(1)
            lse = rings.q.of_thread(query.index, column, plan.config.score_columns)
            scores.apply(frag.acc_S, m_block, phase.is_masked)
            acc_P = scores.exponentiate(frag.acc_S, lse)
            p = frag.hand_over_p(acc_P, query.index, thread)
            if cutlass.const_expr(dv_early):
                warpgroup.fence()
                frag.issue_dv(p, dout.index)
                warpgroup.wait_group(1)
            else:
                warpgroup.wait_group(0)
            delta = rings.do.of_thread(dout.index, column, plan.config.score_columns)
            frag.differentiate(delta)
            ds = frag.hand_over_ds(query.index, thread)
            cute.arch.fence_view_async_shared()
            if cutlass.const_expr(not plan.config.splits_keys):
                plan.barriers.ds_written()
            warpgroup.fence()
            if cutlass.const_expr(not dv_early):
                frag.issue_dv(p, dout.index)
            frag.issue_dk(ds, query.index)
            if cutlass.const_expr(with_dq):
                if cutlass.const_expr(plan.config.splits_keys):
                    plan.barriers.ds_written()
                acc_dQ = frag.new_dq()
                frag.issue_dq(acc_dQ, query.index)
            elif cutlass.const_expr(plan.config.splits_keys):
                cute.arch.sync_warp()  # all lanes have read lse and delta: one releases for them
            warpgroup.wait_group(0 + with_dq)
            query.release()
            dout.release()
            if cutlass.const_expr(with_dq):
                warpgroup.wait_group(0)
                dq_sums.add(acc_dQ, m_block)
            m_block -= 1
    return q, do
