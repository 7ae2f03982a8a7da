"""A consumer warpgroup of the forward kernel for one-byte inputs."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from ..barriers import WARPGROUP, WarpgroupTurn
from ..mask import Mask
from ..scaled_softmax import ScaledSoftmax
from ..scales import KeyScales, OutputUnit
from .rings import FwdRings
from .wgmma import FwdMma, issue_gemm


@dataclass(frozen=True)
class Fp8Fragments:
    """What a thread of a consumer warpgroup multiplies: descriptors and registers."""

    mma: FwdMma
    q: cute.Tensor  # (MMA, 1, d / 32) descriptors
    k: cute.Tensor  # (MMA, 1, d / 32, num_stages) descriptors
    v: cute.Tensor  # (MMA, slices, tile_n / 32, num_stages) descriptors
    p: cute.Tensor  # ((4, 2, 2), 1, tile_n / 32) e4m3 registers
    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1) fp32 registers
    acc_O: cute.Tensor  # ((2, 2, slice / 8), 1, slices) fp32 registers
    block_O: cute.Tensor  # ((2, 2, slice / 8), 1, 1 or 2) fp32 registers: P V of one block
    factors: cute.Tensor  # (2,) by what to multiply O when block_O is added to it

    @staticmethod
    def of(plan, mma: FwdMma, rings: FwdRings, warpgroup_index) -> "Fp8Fragments":
        first_thread = warpgroup_index * WARPGROUP
        qk, pv = mma.qk.get_slice(first_thread), mma.pv.get_slice(first_thread)
        width = plan.config.o_slice or plan.head_dim_v
        buffers = 1 if width == plan.head_dim_v else 2
        s_shape = qk.partition_shape_C((plan.tile_m, plan.tile_n))
        o_shape = pv.partition_shape_C((plan.tile_m, plan.head_dim_v))
        block_shape = pv.partition_shape_C((plan.tile_m, buffers * width))
        p_shape = pv.partition_shape_A((plan.tile_m, plan.tile_n))
        return Fp8Fragments(
            mma=mma,
            q=qk.make_fragment_A(qk.partition_A(rings.q.buffer[None, None, 0])),
            k=qk.make_fragment_B(qk.partition_B(rings.k.buffer)),
            v=pv.make_fragment_B(pv.partition_B(rings.vt.buffer)),
            p=pv.make_fragment_A(p_shape),
            acc_S=cute.make_rmem_tensor(s_shape, Float32),
            acc_O=cute.make_rmem_tensor(o_shape, Float32),
            block_O=cute.make_rmem_tensor(block_shape, Float32),
            factors=cute.make_rmem_tensor(2, Float32),
        )

    @property
    def num_slices(self) -> int:
        return cute.size(self.acc_O, mode=[2])

    def issue_scores(self, stage):
        """S = Q K^T, asynchronously."""
        issue_gemm(self.mma.qk, self.acc_S, self.q, self.k[None, None, None, stage], False)

    def issue_output(self, stage, part: int = 0):
        """P V of a slice of the columns into a buffer of its own, asynchronously."""
        v = cute.logical_divide(self.v, (None, 1))[None, (None, part), None, stage]
        acc = _slice(self.block_O, self._buffer(part))
        issue_gemm(self.mma.pv, acc, self.p, v, False)

    def start(self):
        for t in (self.acc_O, self.block_O, self.factors):
            t.fill(0.0)

    def add_output(self, part: int = 0):
        """O = O * factors (by row) + P V, for a slice whose product has been waited for."""
        total, block = _slice(self.acc_O, part), _slice(self.block_O, self._buffer(part))
        for i in range(cute.size(total)):
            total[i] = total[i] * self.factors[i // 2 % 2] + block[i]

    def _buffer(self, part: int) -> int:
        return part % cute.size(self.block_O, mode=[2])


def _slice(acc: cute.Tensor, part: int) -> cute.Tensor:
    """((2, 2, slice / 8), 1, slices) -> ((2, 2, slice / 8), 1, 1)"""
    return cute.logical_divide(acc, (None, None, 1))[None, None, (None, part)]


def pack(acc_S: cute.Tensor, p: cute.Tensor):
    """P in fp32 -> e4m3 operand registers, without leaving the thread.

    Byte i of register (row r, half h) of the k-th 32 keys multiplies the key that lies there in
    transposed V, which is column 8 (4 k + 2 h + i / 2) + 2 (lane % 4) + i % 2 of S (fp8_load).
    """
    registers = cute.recast_tensor(p, Int32)
    for i in range(cute.size(registers)):
        row, first = i % 2, 4 * (i // 2) * 2  # first: of two groups of 8 columns
        values = [acc_S[first + 4 * group + 2 * row + c] for group in (0, 1) for c in (0, 1)]
        registers[i] = _to_e4m3(*values)


def _to_e4m3(a, b, c, d) -> Int32:
    """Four fp32 -> four bytes, round to nearest even, saturating at 448."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 low, high;"
        " cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0};"
        " cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2};"
        " mov.b32 {$w0}, {low, high}; }",
        write_only_types=[Int32],
        read_only_args=[a, b, c, d],
    )


@cute.jit
def attend(
    frag: Fp8Fragments,
    softmax: ScaledSoftmax,
    unit: OutputUnit,
    scales: KeyScales,
    scale_log2: Float32,
    mask: Mask,
    turn: WarpgroupTurn,
    k: Any,
    v: Any,
    blocks: Any,
    vt: Any,
):
    """One query tile: O (not normalised) and the state of its softmax."""
    softmax.start()
    frag.start()
    unit.start(scales.of_values(blocks.n_max - 1))
    key_scales = scales.of_scores(blocks.n_max - 1)
    key = k.wait_and_advance()
    frag.issue_scores(key.index)
    warpgroup.wait_group(0)
    key.release()
    mask.apply(frag.acc_S, blocks.n_max - 1)
    softmax.update(frag.acc_S, tuple(s * scale_log2 for s in key_scales))

    for phase in blocks.phases():
        for i in cutlass.range(phase.n_end - phase.n_begin, unroll=1):
            n_block = phase.n_end - 1 - i
            key_scales = scales.of_scores(n_block)
            value_scale = scales.of_values(n_block + 1)
            warpgroup.wait_group(0)
            if n_block < blocks.n_max - 2:
                vt.release(vt.slot_before(v))
            frag.add_output()
            softmax.exponentiate(frag.acc_S)
            pack(frag.acc_S, frag.p)
            key = k.wait_and_advance()
            value = v.wait_and_advance()
            turn.wait()
            frag.issue_scores(key.index)
            frag.issue_output(value.index)
            turn.pass_on()
            warpgroup.wait_group(1)
            key.release()
            softmax.factors(unit.change_to(value_scale), frag.factors)
            if cutlass.const_expr(phase.is_masked):
                mask.apply(frag.acc_S, n_block)
            softmax.update(frag.acc_S, tuple(s * scale_log2 for s in key_scales))

    value_scale = scales.of_values(blocks.n_min)
    warpgroup.wait_group(0)
    if blocks.count > 1:
        vt.release(vt.slot_before(v))
    frag.add_output()
    softmax.exponentiate(frag.acc_S)
    pack(frag.acc_S, frag.p)
    value = v.wait_and_advance()
    frag.issue_output(value.index)
    softmax.factors(unit.change_to(value_scale), frag.factors)
    warpgroup.wait_group(0)
    value.release()
    frag.add_output()
    return k, v
