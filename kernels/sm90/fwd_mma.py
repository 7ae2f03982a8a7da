"""A consumer warpgroup of the forward kernel: S = Q K^T, softmax, O += P V for 64 query rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import warpgroup

from ..barriers import WARPGROUP, WarpgroupTurn
from ..mask import Mask
from ..softmax import OnlineSoftmax
from ..views import convert
from .rings import FwdRings
from .wgmma import FwdMma, issue_gemm


@dataclass(frozen=True)
class FwdFragments:
    """What a thread of a consumer warpgroup multiplies: descriptors and registers."""

    mma: FwdMma
    q: cute.Tensor  # (MMA, 1, d / 16) descriptors
    k: cute.Tensor  # (MMA, 1, d / 16, num_stages) descriptors
    v: cute.Tensor  # (MMA, 1, tile_n / 16, num_stages) descriptors
    p: cute.Tensor  # ((2, 2, 2), 1, tile_n / 16) 16-bit registers
    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1) fp32 registers
    acc_O: cute.Tensor  # ((2, 2, dv / 8), 1, 1) fp32 registers

    @staticmethod
    def of(plan, mma: FwdMma, rings: FwdRings, warpgroup_index) -> "FwdFragments":
        first_thread = warpgroup_index * WARPGROUP
        qk, pv = mma.qk.get_slice(first_thread), mma.pv.get_slice(first_thread)
        s_shape = qk.partition_shape_C((plan.tile_m, plan.tile_n))
        o_shape = pv.partition_shape_C((plan.tile_m, plan.head_dim_v))
        p_shape = pv.partition_shape_A((plan.tile_m, plan.tile_n))
        return FwdFragments(
            mma=mma,
            q=qk.make_fragment_A(qk.partition_A(rings.q.buffer[None, None, 0])),
            k=qk.make_fragment_B(qk.partition_B(rings.k.buffer)),
            v=pv.make_fragment_B(pv.partition_B(rings.v.buffer)),
            p=pv.make_fragment_A(p_shape),
            acc_S=cute.make_rmem_tensor(s_shape, Float32),
            acc_O=cute.make_rmem_tensor(o_shape, Float32),
        )

    def issue_scores(self, stage):
        """S = Q K^T, asynchronously."""
        issue_gemm(self.mma.qk, self.acc_S, self.q, self.k[None, None, None, stage], False)

    def receive_scores(self):
        """What remains to be done when issue_scores() has been waited for: nothing."""

    def issue_output(self, stage, n_block):
        """O += P V, asynchronously."""
        issue_gemm(self.mma.pv, self.acc_O, self.p, self.v[None, None, None, stage], True)

    def start(self, n_block):
        """Before the first block of a tile."""
        self.acc_O.fill(0.0)

    def add_output(self, stage):
        """What remains to be done when issue_output() has been waited for: nothing."""

    def convert(self):
        """P -> operand."""
        convert(self.acc_S, self.p)


@dataclass(frozen=True)
class SoftmaxScale:
    """The factor that every score gets, in log2."""

    scale_log2: Float32

    def of_scores(self, n_block, is_masked: bool) -> tuple:
        """A factor per equal part of a block's columns."""
        return (self.scale_log2,)


@cute.jit
def attend(
    frag: Any,
    softmax: OnlineSoftmax,
    factors: Any,
    mask: Mask,
    turn: WarpgroupTurn,
    k: Any,
    v: Any,
    blocks: Any,
    keep_last_key: cutlass.Constexpr,
    meanwhile: Callable,
):
    """One query tile up to its last P; O += P V of the last block remains (accumulate_last).

    With keep_last_key the slot of the last K block is not released.  meanwhile() runs beside the
    first product.  One wgmma.fence serves both products of a step: what they use is ready by then.
    """
    softmax.start()
    frag.start(blocks.n_max - 1)
    scales = factors.of_scores(blocks.n_max - 1, is_masked=True)
    key = k.wait_and_advance()
    warpgroup.fence()
    frag.issue_scores(key.index)
    meanwhile()
    warpgroup.wait_group(0)
    _release(key, keep_last_key, blocks.count == 1)
    frag.receive_scores()
    mask.apply(frag.acc_S, blocks.n_max - 1)
    softmax.scale(frag.acc_S, scales)
    softmax.move(frag.acc_S, None)
    moves = cutlass.Boolean(False)

    for phase in blocks.phases():
        n_block = phase.n_end - 1
        while n_block >= phase.n_begin:
            if moves:
                softmax.move(frag.acc_S, frag.acc_O)
            moves = cutlass.Boolean(False)
            # Steps that move no maximum, which is nearly all of them, stay in this loop.
            while n_block >= phase.n_begin and not moves:
                scales = factors.of_scores(n_block, phase.is_masked)
                softmax.exponentiate(frag.acc_S)
                frag.convert()
                key = k.wait_and_advance()
                value = v.wait_and_advance()
                turn.wait()
                warpgroup.fence()
                frag.issue_scores(key.index)
                frag.issue_output(value.index, n_block + 1)
                turn.pass_on()
                warpgroup.wait_group(1)
                _release(key, keep_last_key, n_block == blocks.n_min)
                frag.receive_scores()
                if cutlass.const_expr(phase.is_masked):
                    mask.apply(frag.acc_S, n_block)
                moves = softmax.scale(frag.acc_S, scales)
                warpgroup.wait_group(0)
                frag.add_output(value.index)
                value.release()
                n_block -= 1

    if moves:
        softmax.move(frag.acc_S, frag.acc_O)
    softmax.exponentiate(frag.acc_S)
    frag.convert()
    return k, v


@cute.jit
def _release(key: Any, keep_last: cutlass.Constexpr, is_last):
    if cutlass.const_expr(keep_last):
        if not is_last:
            key.release()
    else:
        key.release()


@cute.jit
def accumulate_last(
    frag: Any, v: Any, n_block: Any, meanwhile: Callable, keep_value: cutlass.Constexpr
):
    """O += P V of the tile's last block; meanwhile() is computed beside it and returned.

    With keep_value the slot of that V block is not released.
    """
    value = v.wait_and_advance()
    warpgroup.fence()
    frag.issue_output(value.index, n_block)
    result = meanwhile()
    warpgroup.wait_group(0)
    frag.add_output(value.index)
    if cutlass.const_expr(not keep_value):
        value.release()
    return v, result
