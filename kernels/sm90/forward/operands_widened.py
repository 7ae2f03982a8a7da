"""OperandsWidened: what 16-bit q beside one-byte k and v puts into the kernel's places.

    TMA            K_n         | V_n     | K_n-1      | V_n-1   |       bytes
    widening                   |     K_n |     V_n    |   K_n-1  ..     bytes -> 16 bits
    consumers      as of 16-bit inputs; scores and O have scales

Generating text is bound by the bytes of K and V, which are half as many; the consumers and their
accuracy are those of 16-bit inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.memory import SmemAllocator

from ...arguments import FwdArguments
from ...config import FwdConfig
from ...elements import Elements
from ...example import head_scales
from ...scales import TINY, HeadScales
from ...scores import SoftmaxScale
from ...signature import Signature
from ...softmax import OnlineSoftmax
from ...tensors import FwdScalars, FwdTensors, permute
from ..rings import FwdRings, Ring, swizzled
from ..wgmma import FwdMma, FwdSmem
from .kernel import ForwardSm90
from .operands_16bit import FwdFragments, Operands16Bit
from .store import Place
from .widen import WIDENING_WARPS, widen


@dataclass(frozen=True)
class WidenedFragments(FwdFragments):
    v_scale: Float32 | None = None  # of a tile's head

    def take_sum(self, softmax: OnlineSoftmax):
        """The sum of P is the one that the softmax kept; O gets the scale of V."""
        for i in range(cute.size(self.acc_O)):
            self.acc_O[i] = self.acc_O[i] * self.v_scale


@dataclass(frozen=True)
class OperandsWidened(Operands16Bit):
    """K and V as 16-bit inputs have them, made of bytes on the way."""

    @property
    def example_scales(self):
        return partial(head_scales, self.plan.signature.is_ragged)

    def scales(self, arguments: FwdArguments) -> HeadScales:
        return HeadScales(*(permute(t, [1, 0]) for t in (arguments.k_scales, arguments.v_scales)))

    @property
    def operand_ring(self) -> Callable:
        """Makes the ring of K or V as they are multiplied."""
        return partial(Ring.written_by, WIDENING_WARPS)

    def shared_memory(self, allocator: SmemAllocator) -> tuple[FwdRings, cute.Pointer | None]:
        """Rings of Q, K, V and of the bytes, and where O goes, if anywhere."""
        plan = self.plan
        rings, o = super().shared_memory(allocator)
        layouts = FwdSmem.in_memory(plan.signature, plan.config)
        element = Elements.in_memory(plan.signature)

        def ring(dtype, layout):
            memory = allocator.allocate_array(dtype, cute.cosize(layout), byte_alignment=1024)
            barriers = allocator.allocate_array(cutlass.Int64, 2 * cute.size(layout, mode=[2]))
            return plan.key_ring(swizzled(memory, layout), barriers, WIDENING_WARPS)

        k_bytes, v_bytes = ring(element.k, layouts.k), ring(element.v, layouts.v)
        return replace(rings, k_bytes=k_bytes, v_by_keys=v_bytes), o

    def assist(self, rings: FwdRings, work: Any, worker, lane):
        """The producer warpgroup's other warps widen K and V."""
        widen(self.plan, rings, work, worker, lane)

    def fragments(self, mma: FwdMma, rings: FwdRings, warpgroup) -> WidenedFragments:
        return WidenedFragments(**vars(super().fragments(mma, rings, warpgroup)))

    def of_tile(
        self, frag: WidenedFragments, tensors: FwdTensors, scalars: FwdScalars, place: Place
    ):
        """The fragments, and the factors of the scores of a warpgroup's rows."""
        k, v = tensors.scales.of_head(place.tile)
        return replace(frag, v_scale=v), SoftmaxScale(scalars.scale_log2 * k + TINY)


def forward(signature: Signature, config: FwdConfig) -> ForwardSm90:
    """The forward kernel for fp16 and bf16 q beside one-byte k and v."""
    return ForwardSm90(signature, config, OperandsWidened)
