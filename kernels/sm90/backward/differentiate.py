"""A consumer warpgroup of the backward kernel: 64 keys and all queries that see them."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from ...key_mask import KeyMask
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
    mask: KeyMask,
    dq_sums: DqSums,
    thread: Int32,
    scale_log2: Float32,
):
    """dK and dV of one query head, dQ to memory.

    The buffers of dS, and of P, have the indices of the stages of Q.

    One wgmma.fence serves the products that follow each other: what they use is ready by then.
    """
    plan = frag.plan
    for phase in blocks.phases():
        m_block = phase.m_end - 1
        while m_block >= phase.m_begin:
            query = q.wait_and_advance()
            warpgroup.fence()
            frag.issue_scores(query.index)
            dout = do.wait_and_advance()
            frag.issue_dp(dout.index)
            warpgroup.wait_group(1)
            lse = rings.q.of_thread(query.index, mask.column, plan.config.score_columns)
            if cutlass.const_expr(phase.is_masked):
                mask.apply(frag.acc_S, m_block)
            frag.exponentiate(scale_log2, lse)
            p = frag.hand_over_p(query.index, thread)
            if cutlass.const_expr(plan.config.dv_early):
                warpgroup.fence()
                frag.issue_dv(p, dout.index)
                warpgroup.wait_group(1)
            else:
                warpgroup.wait_group(0)
            delta = rings.do.of_thread(dout.index, mask.column, plan.config.score_columns)
            frag.differentiate(delta)
            ds = frag.hand_over_ds(query.index, thread)
            cute.arch.fence_view_async_shared()
            if cutlass.const_expr(not plan.config.splits_keys):
                plan.barriers.ds_written()
            warpgroup.fence()
            if cutlass.const_expr(not plan.config.dv_early):
                frag.issue_dv(p, dout.index)
            frag.issue_dk(ds, query.index)
            if cutlass.const_expr(plan.config.splits_keys):
                plan.barriers.ds_written()
            acc_dQ = frag.new_dq()
            frag.issue_dq(acc_dQ, query.index)
            warpgroup.wait_group(2)
            dout.release()
            warpgroup.wait_group(1)
            query.release()
            warpgroup.wait_group(0)
            dq_sums.add(acc_dQ, m_block)
            m_block -= 1
    return q, do
