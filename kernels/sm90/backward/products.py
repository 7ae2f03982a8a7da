"""The five matrix products of the backward kernel, their shared memory and their registers.

Scores are made transposed, keys by queries: then P^T and dS^T are in the registers where the
products with dO and Q want their first operand, and only dS goes through shared memory, for dQ.
Where the warpgroups share the keys (BwdConfig.splits_keys) both go through shared memory.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from cutlass.tensor_utils import LayoutEnum

from ...barriers import WARPGROUP
from ...bwd_config import DELTA_DEPTH
from ...elements import ELEMENT
from ...views import convert, rows_and_columns
from ..wgmma import issue_gemm

ONE_WARPGROUP = (1, 1, 1)


@dataclass(frozen=True)
class BwdMma:
    """Each warpgroup makes its part of every product: rows (keys), or columns of all rows."""

    scores: cute.TiledMma  # S^T = K Q^T
    dp: cute.TiledMma  # dP^T = V dO^T
    delta: cute.TiledMma | None  # dP^T = -1 delta^T, of one warpgroup; None: delta is subtracted
    dv: cute.TiledMma  # dV += P^T dO
    dk: cute.TiledMma  # dK += dS^T Q
    dq: cute.TiledMma  # dQ = dS K

    @staticmethod
    def of(signature, config) -> "BwdMma":
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        by_rows, by_columns = _splits(config)
        own = by_rows if config.splits_keys else by_columns
        sources = warpgroup.OperandSource
        by_keys = sources.RMEM if config.splits_keys else sources.SMEM
        d, dv, dtype = signature.head_dim, signature.head_dim_v, signature.dtype
        parts = ("bf16", k_major, k_major, ONE_WARPGROUP, config.score_columns)
        of_v = sources.RMEM if config.v_in_registers else sources.SMEM
        return BwdMma(
            scores=product(dtype, k_major, k_major, own, config.score_columns),
            dp=product(dtype, k_major, k_major, own, config.score_columns, of_v),
            delta=product(*parts) if config.delta_in_parts else None,
            dv=product(dtype, k_major, mn_major, own, config.channels(dv), by_keys),
            dk=product(dtype, k_major, mn_major, own, config.channels(d), by_keys),
            dq=dq_mma(signature, config),
        )


def product(
    dtype, a_major, b_major, warpgroups, columns: int, source=warpgroup.OperandSource.SMEM
) -> cute.TiledMma:
    """64 rows and so many columns for each of the warpgroups, which lie as (rows, columns, 1)."""
    element = ELEMENT[dtype]
    return hopper.make_trivial_tiled_mma(
        element, element, a_major, b_major, Float32, warpgroups, (64, columns), source
    )


def dq_mma(signature, config) -> cute.TiledMma:
    """dQ = dS K, of all consumers."""
    by_rows, by_columns = _splits(config)
    of_dq = by_rows if config.dq_is_split_by_rows else by_columns
    mn_major, columns = OperandMajorMode.MN, config.dq_channels(signature.head_dim)
    return product(signature.dtype, mn_major, mn_major, of_dq, columns)


def _splits(config) -> tuple:
    return (config.num_mma_warpgroups, 1, 1), (1, config.num_mma_warpgroups, 1)


@dataclass(frozen=True)
class BwdSmem:
    """Layouts of the shared-memory buffers, swizzled as TMA writes and wgmma reads them."""

    k: cute.ComposedLayout  # (tile_n, d, 1)
    v: cute.ComposedLayout  # (tile_n, dv, 1)
    q: cute.ComposedLayout  # (tile_m, d, num_stages)
    do: cute.ComposedLayout  # (tile_m, dv, stages_of_do)
    ds: cute.ComposedLayout  # (tile_m, tile_n, ds_buffers), queries contiguous; P is like it

    @staticmethod
    def of(signature, config) -> "BwdSmem":
        element = ELEMENT[signature.dtype]
        tile_m, tile_n = config.tile_m, config.tile_n
        d, dv = signature.head_dim, signature.head_dim_v
        ds = (tile_m, d, tile_n)
        return BwdSmem(
            k=_rows(element, (tile_n, d, 1), config.dq_channels(d)),
            v=_rows(element, (tile_n, dv, 1), config.channels(dv)),  # for dV, in its place
            q=_rows(element, (tile_m, d, config.num_stages), config.channels(d)),
            do=_rows(element, (tile_m, dv, config.stages_of_do), config.channels(dv)),
            ds=hopper.make_smem_layout_a(LayoutEnum.COL_MAJOR, ds, element, config.ds_buffers),
        )


def parts_layout(rows: int, num_stages: int) -> cute.Layout:
    """(rows, DELTA_DEPTH, num_stages), not swizzled: 8 columns of all rows, then the others."""
    kind = warpgroup.SmemLayoutAtomKind.K_INTER
    atom = warpgroup.make_smem_layout_atom(kind, BFloat16)
    return cute.tile_to_shape(atom, (rows, DELTA_DEPTH, num_stages), (0, 1, 2))


def _rows(element, shape, part: int) -> cute.ComposedLayout:
    """(rows, columns, stages), swizzled so that parts of `part` columns are operands, too."""
    kind = hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, element, part)
    return cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, element), shape, (0, 1, 2))


def dq_layout(signature, config) -> cute.ComposedLayout:
    """(tile_m, d, 1), of 16-bit dQ on its way out."""
    shape = (config.tile_m, signature.head_dim, 1)
    return _rows(ELEMENT[signature.dtype], shape, config.dq_channels(signature.head_dim))


def transposed(buffer: cute.Tensor) -> cute.Tensor:
    """(rows, columns, stages) -> (columns, rows, stages), of the same memory."""
    return cute.make_tensor(buffer.iterator, cute.select(buffer.layout, mode=[1, 0, 2]))


@dataclass(frozen=True)
class BwdFragments:
    """What a thread of a consumer warpgroup multiplies: descriptors and registers."""

    plan: cutlass.Constexpr[Any]
    mma: BwdMma
    k: cute.Tensor  # (MMA, 1, d / 16) descriptors
    v: cute.Tensor  # (MMA, 1, dv / 16) descriptors, or 16-bit registers
    v_buffer: cute.Tensor  # (tile_n, dv)
    q: cute.Tensor  # (MMA, 1, d / 16, num_stages) descriptors
    do: cute.Tensor  # (MMA, 1, dv / 16, num_stages) descriptors
    q_by_rows: cute.Tensor  # (MMA, 1, tile_m / 16, num_stages) descriptors
    do_by_rows: cute.Tensor  # (MMA, 1, tile_m / 16, num_stages) descriptors
    k_by_rows: cute.Tensor  # (MMA, 1, tile_n / 16) descriptors
    ds: cute.Tensor  # (MMA, 1, tile_n / 16, ds_buffers) descriptors, for dQ
    minus_one: cute.Tensor | None  # (MMA, 1, 1) descriptors
    delta: cute.Tensor | None  # (MMA, 1, 1, num_stages) descriptors
    p_by_keys: cute.Tensor  # registers ((2, 2, 2), 1, tile_m / 16); or as ds_by_keys
    ds_by_keys: cute.Tensor  # the same registers; or (MMA, 1, tile_m / 16, num_stages) descriptors
    p_buffer: cute.Tensor | None  # (tile_n, tile_m, num_stages)
    ds_buffer: cute.Tensor  # (tile_n, tile_m, num_stages)
    acc_S: cute.Tensor  # ((2, 2, score_columns / 8), 1, 1) fp32 registers
    acc_dP: cute.Tensor  # the same
    acc_dV: cute.Tensor  # ((2, 2, channels / 8), 1, 1) fp32 registers
    acc_dK: cute.Tensor  # the same

    @staticmethod
    def of(plan, rings, warpgroup_index) -> "BwdFragments":
        mma = BwdMma.of(plan.signature, plan.config)
        first_thread = warpgroup_index * WARPGROUP
        scores, dp, dv, dk, dq = (
            x.get_slice(first_thread) for x in (mma.scores, mma.dp, mma.dv, mma.dk, mma.dq)
        )
        k, v = (ring.buffer[None, None, 0] for ring in (rings.k, rings.v))
        q, do = rings.q.buffer, rings.do.buffer
        tile_m, tile_n = plan.config.tile_m, plan.config.tile_n

        p_buffer = None if rings.p is None else transposed(rings.p)
        ds_buffer = transposed(rings.ds)

        def accumulator(product, rows, columns):
            return cute.make_rmem_tensor(product.partition_shape_C((rows, columns)), Float32)

        def by_keys(product, buffer):
            if plan.config.splits_keys:
                return product.make_fragment_A(product.partition_shape_A((tile_n, tile_m)))
            return product.make_fragment_A(product.partition_A(buffer))

        minus_one = delta = None
        if mma.delta is not None:
            own = mma.delta.get_slice(0)
            minus_one = own.make_fragment_A(own.partition_A(rings.minus_one))
            delta = own.make_fragment_B(own.partition_B(rings.delta))

        return BwdFragments(
            plan=plan,
            mma=mma,
            minus_one=minus_one,
            delta=delta,
            k=scores.make_fragment_A(scores.partition_A(k)),
            v=_fragment(dp, v, plan.config.v_in_registers),
            v_buffer=v,
            q=scores.make_fragment_B(scores.partition_B(q)),
            do=dp.make_fragment_B(dp.partition_B(do)),
            q_by_rows=dk.make_fragment_B(dk.partition_B(transposed(q))),
            do_by_rows=dv.make_fragment_B(dv.partition_B(transposed(do))),
            k_by_rows=dq.make_fragment_B(dq.partition_B(transposed(rings.k.buffer)[None, None, 0])),
            ds=dq.make_fragment_A(dq.partition_A(rings.ds)),
            p_by_keys=by_keys(dv, p_buffer),
            ds_by_keys=by_keys(dk, ds_buffer),
            p_buffer=p_buffer,
            ds_buffer=ds_buffer,
            acc_S=accumulator(scores, tile_n, tile_m),
            acc_dP=accumulator(scores, tile_n, tile_m),
            acc_dV=accumulator(dv, tile_n, plan.signature.head_dim_v),
            acc_dK=accumulator(dk, tile_n, plan.signature.head_dim),
        )

    def start(self):
        """Before the first query block of a tile."""
        if self.plan.signature.with_dkv:
            self.acc_dV.fill(0.0)
            self.acc_dK.fill(0.0)

    def load_v(self, thread):
        """V of a tile, if registers hold it, ahead of the tile's first product."""
        if self.plan.config.v_in_registers:
            _load(self.mma.dp, self.v_buffer, self.v, thread)
        warpgroup.fence()

    def issue_scores(self, stage):
        """S^T = K Q^T, asynchronously."""
        issue_gemm(self.mma.scores, self.acc_S, self.k, self.q[None, None, None, stage], False)

    def issue_dp(self, stage):
        """dP^T = V dO^T, asynchronously; less delta, if that comes in parts."""
        if self.delta is not None:
            delta = self.delta[None, None, None, stage]
            issue_gemm(self.mma.delta, self.acc_dP, self.minus_one, delta, False, commits=False)
        do = self.do[None, None, None, stage]
        issue_gemm(self.mma.dp, self.acc_dP, self.v, do, self.delta is not None)

    def differentiate(self, delta: cute.Tensor | None = None):
        """dP -> dS in place, of what KeyScores left in acc_S.

        delta: (tile_m / 4,) of this thread's columns; None: dP is less it.
        """
        p, dp = rows_and_columns(self.acc_S), rows_and_columns(self.acc_dP)
        for i in range(cute.size(dp, mode=[1])):
            for r in range(2):
                slope = dp[r, i] if delta is None else dp[r, i] - delta[i]
                dp[r, i] = p[r, i] * slope

    def hand_over_p(self, acc_P: cute.Tensor, buffer, thread) -> cute.Tensor | None:
        """P^T in 16 bits, as issue_dv() takes it; None if nobody will."""
        if not self.plan.signature.with_dkv:
            return None
        if self.plan.config.splits_keys:
            return self._converted(acc_P, self.p_by_keys)
        self._write(self._converted(acc_P, acc_P), self.p_buffer, buffer, thread)
        return self.p_by_keys[None, None, None, buffer]

    def rounded_ds(self) -> cute.Tensor:
        """dS^T in 16 bits, as issue_dk() takes it from registers."""
        return self._converted(self.acc_dP, self.ds_by_keys)

    def write_ds(self, ds: cute.Tensor, buffer, thread):
        """To shared memory, for dQ, where asynchronous reads will see it."""
        self._write(ds, self.ds_buffer, buffer, thread)
        cute.arch.fence_view_async_shared()

    def hand_over_ds(self, buffer, thread) -> cute.Tensor:
        """dS^T in 16 bits in shared memory, as issue_dk() takes it, and for dQ."""
        self._write(self._converted(self.acc_dP, self.acc_dP), self.ds_buffer, buffer, thread)
        return self.ds_by_keys[None, None, None, buffer]

    def _converted(self, acc: cute.Tensor, like: cute.Tensor) -> cute.Tensor:
        values = cute.make_rmem_tensor_like(like, self.plan.element)
        convert(acc, values)
        return values

    def _write(self, values: cute.Tensor, target: cute.Tensor, buffer, thread):
        """registers -> stmatrix -> shared memory."""
        store(self.mma.scores, values, self.acc_dP, target[None, None, buffer], thread)

    def issue_dv(self, p: cute.Tensor | None, stage):
        """dV += P^T dO, asynchronously, if it is wanted; early as a group, else as part of dK's."""
        if not self.plan.signature.with_dkv:
            return
        do = self.do_by_rows[None, None, None, stage]
        issue_gemm(self.mma.dv, self.acc_dV, p, do, True, commits=self.plan.config.dv_early)

    def issue_dk(self, ds: cute.Tensor, stage):
        """dK += dS^T Q, asynchronously, if it is wanted."""
        if not self.plan.signature.with_dkv:
            return
        issue_gemm(self.mma.dk, self.acc_dK, ds, self.q_by_rows[None, None, None, stage], True)

    def issue_dq(self, acc_dQ: cute.Tensor, stage):
        """dQ = dS K, asynchronously."""
        a = self.ds[None, None, None, stage]
        issue_gemm(self.mma.dq, acc_dQ, a, self.k_by_rows, False)

    def new_dq(self) -> cute.Tensor:
        """((2, 2, columns / 8), 1, 1) fp32 registers: this warpgroup's part of dQ."""
        shape = (self.plan.config.tile_m, self.plan.signature.head_dim)
        return cute.make_rmem_tensor(self.mma.dq.partition_shape_C(shape), Float32)


def _fragment(mma: cute.ThrMma, buffer: cute.Tensor, in_registers: bool) -> cute.Tensor:
    """The first operand: registers, or descriptors of the buffer."""
    if in_registers:
        return mma.make_fragment_A(mma.partition_shape_A(buffer.shape))
    return mma.make_fragment_A(mma.partition_A(buffer))


def _load(mma: cute.TiledMma, buffer: cute.Tensor, fragment: cute.Tensor, thread):
    """shared memory -> ldmatrix -> registers."""
    op = warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4)
    atom = cute.make_copy_atom(op, fragment.element_type)
    copy = cute.make_tiled_copy_A(atom, mma).get_slice(thread)
    cute.copy(copy, copy.partition_S(buffer), copy.retile(fragment))


def store(
    mma: cute.TiledMma,
    values: cute.Tensor,
    acc: cute.Tensor,
    target: cute.Tensor,
    thread,
    order: LayoutEnum = LayoutEnum.ROW_MAJOR,
):
    """16-bit values in the order of the accumulator acc -> the tile (rows, columns) of its threads.

    order: of the target's memory.
    """
    atom = hopper.get_smem_store_op(order, values.element_type, Float32)
    copy = cute.make_tiled_copy_C(atom, mma).get_slice(thread)
    source = cute.make_tensor(values.iterator, acc.layout)
    cute.copy(copy, copy.retile(source), copy.partition_D(target))
