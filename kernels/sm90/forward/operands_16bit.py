"""Operands16Bit: what fp16 and bf16 put into the kernel's places."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass.memory import SmemAllocator

from ...arguments import FwdArguments
from ...config import FwdConfig
from ...example import no_scales
from ...scores import SoftmaxScale
from ...signature import Signature
from ...softmax import OnlineSoftmax
from ...tensors import FwdScalars, FwdTensors, TmaOperand
from ...views import convert
from ..rings import FwdRings, Ring, swizzled
from ..tma import tma_store
from ..wgmma import FwdMma, FwdSmem, accumulator, issue_gemm, o_layout
from .kernel import ForwardSm90
from .store import OutputSpace, Place, RegistersToGlobal, write_partial


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
        return FwdFragments(
            mma=mma,
            **mma.operands(plan, rings, warpgroup_index),
            acc_S=accumulator(plan.tile_n),
            acc_O=accumulator(plan.head_dim_v),
        )

    def issue_scores(self, stage):
        """S = Q K^T, asynchronously."""
        issue_gemm(self.mma.qk, self.acc_S, self.q, self.k[None, None, None, stage], False)

    def receive_scores(self):
        """What remains to be done when issue_scores() has been waited for: nothing."""

    def issue_output(self, stage, n_block):
        """O += P V, asynchronously."""
        issue_gemm(self.mma.pv, self.acc_O, self.p, self.v[None, None, None, stage], True)

    def start(self):
        """Before the first block of a tile."""
        self.acc_O.fill(0.0)

    def add_output(self, stage):
        """What remains to be done when issue_output() has been waited for: nothing."""

    def take_sum(self, softmax: OnlineSoftmax):
        """The sum of P is the one that the softmax kept."""

    def convert(self):
        """P -> operand."""
        convert(self.acc_S, self.p)


@dataclass(frozen=True)
class Operands16Bit:
    """Q, K and V as TMA brings them; O leaves by TMA, too, but for partial O."""

    plan: Any

    example_scales = staticmethod(no_scales)

    def scales(self, arguments: FwdArguments) -> None:
        return None

    @property
    def keeps_o(self) -> bool:
        """O stays in registers until it is in global memory."""
        return self.plan.o_space == "registers"

    def output(self, o: cute.Tensor) -> TmaOperand | cute.Tensor:
        if self.keeps_o:
            return o
        plan = self.plan
        smem = o_layout(plan.signature, plan.config)
        return tma_store(plan.lengths.view(o, 0), smem, plan.o_tile)

    def shared_memory(self, allocator: SmemAllocator) -> tuple[FwdRings, cute.Pointer | None]:
        """Rings of Q, K and V, and where O goes, if anywhere."""
        plan = self.plan
        layouts, o_smem = (of(plan.signature, plan.config) for of in (FwdSmem.of, o_layout))

        def space(num_elements):
            return allocator.allocate_array(plan.element, num_elements, byte_alignment=1024)

        def ring(make, pointer, layout):
            barriers = allocator.allocate_array(cutlass.Int64, 2 * cute.size(layout, mode=[2]))
            return make(swizzled(pointer, layout), barriers, 4 * plan.num_mma_warpgroups)

        q_size, o_size = cute.cosize(layouts.q), cute.cosize(o_smem)
        q = space(max(q_size, o_size) if plan.o_space == "q" else q_size)
        k_size = cute.cosize(layouts.k)
        k = space(k_size + cute.cosize(layouts.v))
        v = k + k_size  # OutputSpace relies on V's ring following K's
        o = space(o_size) if plan.o_space == "own" else k if plan.keeps_last_k else q
        o = None if self.keeps_o else o
        q = ring(Ring.of, q, layouts.q)
        k, v = (ring(self.operand_ring, *of) for of in ((k, layouts.k), (v, layouts.v)))
        return FwdRings(q, k, v), o

    @property
    def operand_ring(self) -> Callable:
        """Makes the ring of K or V as they are multiplied."""
        return self.plan.key_ring

    def assist(self, rings: FwdRings, work: Any, worker, lane):
        """The producer warpgroup's other warps have nothing to do."""

    def fragments(self, mma: FwdMma, rings: FwdRings, warpgroup) -> FwdFragments:
        return FwdFragments.of(self.plan, mma, rings, warpgroup)

    def of_tile(self, frag: FwdFragments, tensors: FwdTensors, scalars: FwdScalars, place: Place):
        """The fragments, and the factors of the scores of a warpgroup's rows."""
        return frag, SoftmaxScale(scalars.scale_log2)

    def output_space(self, pointer: cute.Pointer | None, warp) -> OutputSpace | RegistersToGlobal:
        if self.keeps_o:
            return RegistersToGlobal(write_partial)
        layout = o_layout(self.plan.signature, self.plan.config)
        return OutputSpace(self.plan, pointer, layout, warp // 4, warp % 4 == 0)


def forward(signature: Signature, config: FwdConfig) -> ForwardSm90:
    """The forward kernel for fp16 and bf16."""
    return ForwardSm90(signature, config, Operands16Bit)
