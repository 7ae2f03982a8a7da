"""The two warpgroups of a tile that split the products between them (BwdConfig.splits_products).

    first    S = Q K^T      P = exp2(S scale - lse), to shared memory    dV^T += dO^T P
    second   dP = dO V^T    dS = P (dP - delta), to shared memory        dK^T += Q^T dS
    both     half of the columns of dQ = dS K

Each product is 64 rows by all keys of the tile, which shared memory can feed: with 64 queries and
channels in the rows both operands of each come from there.  dS is made of P in 16 bits.

P and dS have one buffer each and a barrier of both warpgroups: who arrives to say that it has
written P has finished the products of the step before that read dS, and the other way round.
Behind the barrier of P each knows, too, that what the other one has waited for is there.

One wgmma.fence serves a step, ahead of the sums: by then the threads have read the scores of this
step and dQ of the one before.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from cutlass.tensor_utils import LayoutEnum

from ...barriers import WARPGROUP
from ...key_mask import QueryRows
from ...scores import KeyScores
from ...views import convert, rows_and_columns
from ..wgmma import issue_gemm
from .dq import DqSums
from .products import ONE_WARPGROUP, dq_mma, product, store, transposed
from .rings import BwdRings


@dataclass(frozen=True)
class SideMma:
    scores: cute.TiledMma  # S = Q K^T or dP = dO V^T
    sums: cute.TiledMma  # dV^T += dO^T P or dK^T += Q^T dS
    dq: cute.TiledMma  # of both warpgroups

    @staticmethod
    def of(plan) -> "SideMma":
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        dtype, keys = plan.signature.dtype, plan.config.tile_n
        return SideMma(
            scores=product(dtype, k_major, k_major, ONE_WARPGROUP, keys),
            sums=product(dtype, mn_major, k_major, ONE_WARPGROUP, keys),
            dq=dq_mma(plan.signature, plan.config),
        )


@dataclass(frozen=True)
class Side:
    """What a thread of one of the two multiplies: descriptors and registers."""

    plan: cutlass.Constexpr[Any]
    mma: SideMma
    rows: cute.Tensor  # of Q or dO, (MMA, 1, channels / 16, stages) descriptors
    keys: cute.Tensor  # of K or V, (MMA, 1, channels / 16) descriptors
    channels: cute.Tensor  # of dO or Q, (MMA, channels / 64, tile_m / 16, stages) descriptors
    values: cute.Tensor  # of P or dS, (MMA, 1, tile_m / 16) descriptors
    ds: cute.Tensor  # (MMA, 1, tile_n / 16) descriptors, for dQ
    k_by_rows: cute.Tensor  # (MMA, dq_slices, tile_n / 16) descriptors, for dQ
    p_buffer: cute.Tensor  # (tile_m, tile_n), queries contiguous
    ds_buffer: cute.Tensor  # the same
    acc_scores: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1) fp32 registers: S or dP
    acc_sums: cute.Tensor  # ((2, 2, tile_n / 8), channels / 64, 1) fp32 registers: dV^T or dK^T

    @staticmethod
    def of(plan, rings: BwdRings, is_first: bool) -> "Side":
        config, mma = plan.config, SideMma.of(plan)
        scores, sums = (x.get_slice(0) for x in (mma.scores, mma.sums))
        dq = mma.dq.get_slice(0 if is_first else WARPGROUP)
        rows, others = (rings.q, rings.do) if is_first else (rings.do, rings.q)
        keys = (rings.k if is_first else rings.v).buffer[None, None, 0]
        p, ds = (x[None, None, 0] for x in (rings.p, rings.ds))
        k_by_rows = transposed(rings.k.buffer)[None, None, 0]
        num_channels = cute.size(others.buffer, mode=[1])

        def accumulator(of, shape):
            return cute.make_rmem_tensor(of.partition_shape_C(shape), Float32)

        of_keys = cute.make_tensor(
            (p if is_first else ds).iterator, cute.select(p.layout, mode=[1, 0])
        )
        return Side(
            plan=plan,
            mma=mma,
            rows=scores.make_fragment_A(scores.partition_A(rows.buffer)),
            keys=scores.make_fragment_B(scores.partition_B(keys)),
            channels=sums.make_fragment_A(sums.partition_A(transposed(others.buffer))),
            values=sums.make_fragment_B(sums.partition_B(of_keys)),
            ds=dq.make_fragment_A(dq.partition_A(ds)),
            k_by_rows=dq.make_fragment_B(dq.partition_B(k_by_rows)),
            p_buffer=p,
            ds_buffer=ds,
            acc_scores=accumulator(scores, (config.tile_m, config.tile_n)),
            acc_sums=accumulator(sums, (num_channels, config.tile_n)),
        )

    def start(self):
        """Before the first query block of a tile."""
        if self.plan.signature.with_dkv:
            self.acc_sums.fill(0.0)
        warpgroup.fence()

    def issue_scores(self, stage):
        """S or dP, asynchronously."""
        rows = self.rows[None, None, None, stage]
        issue_gemm(self.mma.scores, self.acc_scores, rows, self.keys, False)

    def issue_sums(self, stage):
        """dV^T or dK^T, asynchronously, if they are wanted."""
        if not self.plan.signature.with_dkv:
            return
        channels = self.channels[None, None, None, stage]
        issue_gemm(self.mma.sums, self.acc_sums, channels, self.values, True)

    def issue_dq(self, acc_dQ: cute.Tensor, part: int):
        """A slice of dQ, asynchronously."""
        keys = self.k_by_rows[None, part, None]
        keys = cute.make_tensor(keys.iterator, cute.append(keys.layout, cute.make_layout(1)))
        keys = cute.make_tensor(keys.iterator, cute.select(keys.layout, mode=[0, 2, 1]))
        issue_gemm(self.mma.dq, acc_dQ, self.ds, keys, False)

    def new_dq(self) -> cute.Tensor:
        """((2, 2, columns / 8), 1, 1) fp32 registers: this warpgroup's part of a slice."""
        config = self.plan.config
        shape = (config.tile_m, self.plan.signature.head_dim // config.dq_slices)
        return cute.make_rmem_tensor(self.mma.dq.partition_shape_C(shape), Float32)

    def write(self, acc: cute.Tensor, buffer: cute.Tensor, thread):
        """Registers -> 16 bits -> shared memory, where asynchronous reads will see them."""
        values = cute.make_rmem_tensor_like(acc, self.plan.element)
        convert(acc, values)
        store(self.mma.scores, values, acc, buffer, thread, LayoutEnum.COL_MAJOR)
        cute.arch.fence_view_async_shared()

    def read_p(self, thread) -> cute.Tensor:
        """P in 16 bits, in the order of the accumulator."""
        p = cute.make_rmem_tensor_like(self.acc_scores, self.plan.element)
        op = warp.LdMatrix8x8x16bOp(transpose=True, num_matrices=4)
        atom = cute.make_copy_atom(op, self.plan.element)
        copy = cute.make_tiled_copy_C(atom, self.mma.scores).get_slice(thread)
        cute.copy(copy, copy.partition_S(self.p_buffer), copy.retile(p))
        return p

    def differentiate(self, p: cute.Tensor, delta: cute.Tensor):
        """dP -> dS in place.  delta: (2, 1), of this thread's rows."""
        p, dp = rows_and_columns(p), rows_and_columns(self.acc_scores)
        for i in range(cute.size(dp, mode=[1])):
            for r in range(2):
                dp[r, i] = p[r, i].to(Float32) * (dp[r, i] - delta[r, 0])


@cute.jit
def make_p_and_dv(
    side: Side,
    rings: BwdRings,
    q: Any,
    do: Any,
    blocks: Any,
    scores: KeyScores,
    dq_sums: DqSums | None,
    thread: Int32,
):
    """The first warpgroup, of one query head."""
    rows: QueryRows = scores.mask
    for phase in blocks.phases():
        m_block = phase.m_end - 1
        while m_block >= phase.m_begin:
            query = q.wait_and_advance()
            side.issue_scores(query.index)
            warpgroup.wait_group(0)
            lse = rings.q.of_rows(query.index, rows.row)
            scores.apply(side.acc_scores, m_block, phase.is_masked)
            side.write(scores.exponentiate(side.acc_scores, lse), side.p_buffer, thread)
            side.plan.barriers.p_written()
            dout = do.current_handle()  # full: the other side has waited for it
            do.advance()
            warpgroup.fence()
            side.issue_sums(dout.index)
            query.release()
            side.plan.barriers.ds_written()
            _add_dq(side, dq_sums, m_block, dout)
            m_block -= 1
    return q, do


@cute.jit
def make_ds_and_dk(
    side: Side,
    rings: BwdRings,
    q: Any,
    do: Any,
    blocks: Any,
    row: Int32,
    dq_sums: DqSums | None,
    thread: Int32,
):
    """The second warpgroup, of one query head.  row: as of QueryRows."""
    for j in cutlass.range(blocks.count, unroll=1):
        dout = do.wait_and_advance()
        side.issue_scores(dout.index)
        warpgroup.wait_group(0)
        delta = rings.do.of_rows(dout.index, row)
        side.plan.barriers.p_written()
        dout.release()
        side.differentiate(side.read_p(thread), delta)
        side.write(side.acc_scores, side.ds_buffer, thread)
        side.plan.barriers.ds_written()
        query = q.current_handle()  # full, as dO there
        q.advance()
        warpgroup.fence()
        side.issue_sums(query.index)
        _add_dq(side, dq_sums, blocks.m_max - 1 - j, query)
    return q, do


@cute.jit
def _add_dq(side: Side, dq_sums: DqSums | None, m_block: Int32, used: Any):
    """The slices of dQ behind dV or dK, and what those have `used` released.

    A slice is added while the tensor cores make the other warpgroup's.
    """
    if cutlass.const_expr(dq_sums is None):
        warpgroup.wait_group(0)
        used.release()
    else:
        for part in cutlass.range_constexpr(side.plan.config.dq_slices):
            acc_dQ = side.new_dq()
            side.issue_dq(acc_dQ, part)
            if cutlass.const_expr(part == 0):
                warpgroup.wait_group(1)
                used.release()
            warpgroup.wait_group(0)
            dq_sums.add(acc_dQ, m_block, part)
