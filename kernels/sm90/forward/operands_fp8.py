"""OperandsFp8: what one-byte q, k and v put into the kernel's places.

    producer   warp 0: TMA as ever; warps 1 to 3: V of each stage into a ring of its own, transposed
    consumers  S = Q K^T, softmax of scaled scores, P to e4m3, P V of each block on its own,
               O += P V in fp32; O leaves from registers

    TMA            K_n         | V_n     | K_n-1      | V_n-1   |
    transposing                |     V_n -> V^T_n     |     V_n-1 -> V^T_n-1   |
    consumers      | S_n | softmax, P_n to e4m3       | S_n-1, P_n V_n | O += | softmax ..

Two-level accumulation: the tensor core adds one-byte products in an accumulator of about 13
fraction bits; only the keys of one block meet there.

Sources: FlashAttention-3 (arXiv 2407.08608), section 3.3; DeepSeek-V3 (arXiv 2412.19437), section
3.3.2, on the accumulator.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator

from ...arguments import FwdArguments
from ...config import FwdConfig
from ...elements import Elements
from ...scales import Scales, TileScales
from ...signature import Signature
from ...softmax import OnlineSoftmax
from ...tensors import FwdScalars, FwdTensors, permute
from ...views import four_bytes
from ..rings import FwdRings, Ring, swizzled
from ..wgmma import FwdMma, FwdSmem, accumulator, issue_gemm, v_slice, vt_layout, vt_rows
from .kernel import ForwardSm90
from .store import Place, RegistersToGlobal
from .store_fp8 import store_output
from .transpose import TRANSPOSING_WARPS, transpose


@dataclass(frozen=True)
class Fp8Fragments:
    """What a thread of a consumer warpgroup multiplies: descriptors and registers.

    The products P V of each block are accumulated on their own and added to O in fp32 afterwards.
    Where O leaves no room for all of them beside S, they follow each other in slices of columns.
    """

    mma: FwdMma
    q: cute.Tensor  # (MMA, 1, d / 32) descriptors
    k: cute.Tensor  # (MMA, 1, d / 32, num_stages) descriptors
    v: cute.Tensor  # (MMA, slices, tile_n / 32, num_stages) descriptors
    p: cute.Tensor  # ((4, 2, 2), 1, tile_n / 32) e4m3 registers
    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1) fp32 registers
    acc_O: cute.Tensor  # ((2, 2, columns / 8), 1, 1) fp32 registers
    block_O: cute.Tensor  # ((2, 2, slice / 8), 1, 1) fp32 registers: P V of one block
    v_scale: cute.Tensor  # (1,) fp32, of the block whose P V is being made
    scales: TileScales | None
    head_dim_v: cutlass.Constexpr[int]
    is_integer: cutlass.Constexpr[bool]  # Q and K

    @staticmethod
    def of(plan, mma: FwdMma, rings: FwdRings, warpgroup_index) -> "Fp8Fragments":
        return Fp8Fragments(
            mma=mma,
            **mma.operands(plan, rings, warpgroup_index),
            acc_S=accumulator(plan.tile_n),
            acc_O=accumulator(vt_rows(plan.signature, plan.config)),
            block_O=accumulator(v_slice(plan.signature, plan.config)),
            v_scale=cute.make_rmem_tensor(1, Float32),
            scales=None,
            head_dim_v=plan.head_dim_v,
            is_integer=plan.signature.dtype == "int8",
        )

    def with_scales(self, scales: TileScales) -> "Fp8Fragments":
        return replace(self, scales=scales)

    def issue_scores(self, stage):
        """S = Q K^T, asynchronously; integers wait for receive_scores()."""
        acc = cute.recast_tensor(self.acc_S, Int32) if self.is_integer else self.acc_S
        issue_gemm(self.mma.qk, acc, self.q, self.k[None, None, None, stage], False)

    def receive_scores(self):
        """Integer scores -> fp32 in the same registers; exact, they stay below 2^23.

        An accumulator that starts at the bits of 1.5 * 2^23 needs no conversion and saves nothing:
        setting it costs as many instructions, and taking the constant off again registers.
        """
        if self.is_integer:
            integers = cute.recast_tensor(self.acc_S, Int32)
            for i in range(cute.size(integers)):
                self.acc_S[i] = integers[i].to(Float32)

    def issue_output(self, stage, n_block):
        """P V of the first slice, asynchronously."""
        self._issue(stage, 0)
        self.v_scale[0] = self.scales.of_values(n_block)

    def add_output(self, stage):
        """O += P V, slice by slice; the first one has been waited for."""
        self._add(0)
        for part in range(1, cute.size(self.acc_O) // cute.size(self.block_O)):
            warpgroup.fence()
            self._issue(stage, part)
            warpgroup.wait_group(0)
            self._add(part)

    def start(self):
        self.acc_O.fill(0.0)

    def take_sum(self, softmax: OnlineSoftmax):
        """The sum of P from the rows of ones, which gave it to all four threads of a row.

        The sum that the softmax kept is unused then, and the compiler drops its additions.
        """
        columns = cute.size(self.acc_O) - cute.size(self.o)
        if columns > 0:
            for r in range(2):
                softmax.row_sum[r] = 0.25 * self.acc_O[cute.size(self.o) + 2 * r]

    @property
    def o(self) -> cute.Tensor:
        """O without the sums."""
        return cute.make_tensor(
            self.acc_O.iterator, cute.make_layout(((2, 2, self.head_dim_v // 8), 1, 1))
        )

    def convert(self):
        pack(self.acc_S, self.p)

    def _issue(self, stage, part: int):
        v = cute.logical_divide(self.v, (None, 1))[None, (None, part), None, stage]
        issue_gemm(self.mma.pv, self.block_O, self.p, v, False)

    def _add(self, part: int):
        """O += P V, for a slice."""
        first = part * cute.size(self.block_O)
        for i in range(cute.size(self.block_O)):
            product = self.block_O[i]
            is_sum = first + i >= cute.size(self.o)
            if self.scales.quantised.v_block and not is_sum:
                product = product * self.v_scale[0]
            self.acc_O[first + i] += product


@dataclass(frozen=True)
class OperandsFp8:
    """V is transposed on the way, scores and O have scales, O leaves from registers."""

    plan: Any

    def example_scales(self, batch, heads_k, dv) -> tuple:
        """The descales, and the shift of v by 16 bytes; packed tensors tell no batch."""

        def entries():
            return cute.sym_int32() if self.plan.signature.is_ragged else batch

        def scales(heads):
            strides = (cute.sym_int64(), cute.sym_int64(), cute.sym_int32())
            shape = (entries(), heads, cute.sym_int32())
            return make_fake_tensor(Float32, shape, strides, assumed_align=4)

        strides = tuple(cute.sym_int64(divisibility=4) for _ in range(2))
        shift = make_fake_tensor(Float32, (entries(), heads_k, dv), (*strides, 1), assumed_align=16)
        return scales(cute.sym_int32()), scales(heads_k), scales(heads_k), shift

    def scales(self, arguments: FwdArguments) -> Scales:
        given = arguments.q_scales, arguments.k_scales, arguments.v_scales, arguments.v_shift
        return Scales(*(permute(t, [2, 1, 0]) for t in given))

    def output(self, o: cute.Tensor) -> cute.Tensor:
        return o

    def shared_memory(self, allocator: SmemAllocator) -> tuple[FwdRings, None]:
        """Rings of Q, K, transposed V and V; O needs no space."""
        plan = self.plan
        layouts, element = FwdSmem.of(plan.signature, plan.config), Elements.of(plan.signature)
        consumer_warps = 4 * plan.num_mma_warpgroups

        def ring(make, dtype, layout, readers):
            memory = allocator.allocate_array(dtype, cute.cosize(layout), byte_alignment=1024)
            barriers = allocator.allocate_array(cutlass.Int64, 2 * cute.size(layout, mode=[2]))
            return make(swizzled(memory, layout), barriers, readers)

        q = ring(Ring.of, element.q, layouts.q, consumer_warps)
        k = ring(plan.key_ring, element.k, layouts.k, consumer_warps)
        v_by_keys = ring(plan.key_ring, element.v, layouts.v, TRANSPOSING_WARPS)
        by_warps = partial(Ring.written_by, TRANSPOSING_WARPS)
        transposed = vt_layout(plan.signature, plan.config)
        v = ring(by_warps, element.v, transposed, consumer_warps)
        return FwdRings(q, k, v, v_by_keys), None

    def assist(self, rings: FwdRings, work: Any, worker, lane):
        """The producer warpgroup's other warps transpose V."""
        transpose(self.plan, rings, work, worker, lane)

    def fragments(self, mma: FwdMma, rings: FwdRings, warpgroup) -> Fp8Fragments:
        return Fp8Fragments.of(self.plan, mma, rings, warpgroup)

    def of_tile(self, frag: Fp8Fragments, tensors: FwdTensors, scalars: FwdScalars, place: Place):
        """The fragments, and the factors of the scores of a warpgroup's rows."""
        # What a loop carries has left the uniform registers, and with it every address of a scale.
        uniform = cute.arch.make_warp_uniform
        tile = replace(place.tile, head_kv=uniform(place.tile.head_kv))
        sequence = place.sequence.uniform()
        num_heads = tensors.lse.shape[1]
        scales = tensors.scales.of_tile(
            tile, sequence, place.first_row, num_heads, scalars.scale_log2, self.plan
        )
        return frag.with_scales(scales), scales

    def output_space(self, pointer: None, warp) -> RegistersToGlobal:
        return RegistersToGlobal(store_output)


def forward(signature: Signature, config: FwdConfig) -> ForwardSm90:
    """The forward kernel for one-byte inputs."""
    return ForwardSm90(signature, config, OperandsFp8)


def pack(acc_S: cute.Tensor, p: cute.Tensor):
    """P in fp32 -> e4m3 operand registers, without leaving the thread.

    Byte i of register (row r, half h) of the k-th 32 keys multiplies the key that lies there in
    transposed V, which is column 8 (4 k + 2 h + i / 2) + 2 (lane % 4) + i % 2 of S (transpose.py).
    """
    registers = cute.recast_tensor(p, Int32)
    for i in range(cute.size(registers)):
        row, first = i % 2, 4 * (i // 2) * 2  # first: of two groups of 8 columns
        values = [acc_S[first + 4 * group + 2 * row + c] for group in (0, 1) for c in (0, 1)]
        registers[i] = four_bytes(*values, "e4m3")
