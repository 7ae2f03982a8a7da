"""Matrix products of warps: mma.sync m16n8k16 with operands that ldmatrix reads.

A warp's accumulator of 16 rows is kept as wgmma's is for one of its four warps, ((2, 2, N/8), 1, 1):
the instructions' fragments agree, so that softmax, mask and scores see the same rows and columns.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import warp

ELEMENT = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}
ROWS = 16  # of a fragment


def tiled_mma(element: type, num_warps: int) -> cute.TiledMma:
    """All warps side by side along M; 16 columns of B at a time, which one ldmatrix brings."""
    op = warp.MmaF16BF16Op(element, Float32, (16, 8, 16))
    return cute.make_tiled_mma(op, (num_warps, 1, 1), permutation_mnk=(16 * num_warps, 16, 16))


def accumulator(columns: int) -> cute.Tensor:
    """((2, 2, columns / 8), 1, 1) fp32 registers: 16 rows of a warp."""
    return cute.make_rmem_tensor(((2, 2, columns // 8), 1, 1), Float32)


def operand(keys: int, element: type) -> cute.Tensor:
    """((2, 2, 2), 1, keys / 16): an accumulator's elements in their order, as an operand A."""
    return cute.make_rmem_tensor(((2, 2, 2), 1, keys // 16), element)


def as_fragment(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, N/8), 1, 1) -> ((2, 2), 1, N/8), as mma.sync sees it."""
    columns = cute.size(acc) // 4
    layout = cute.make_layout(((2, 2), 1, columns), stride=((1, 2), 0, 4))
    return cute.make_tensor(acc.iterator, layout)


@dataclass(frozen=True)
class SharedOperand:
    """An operand in shared memory and the registers that one step of K of it needs."""

    copy: cute.TiledCopy
    source: cute.Tensor  # (COPY, rows, K / 16, stages)
    fragment: cute.Tensor  # (MMA, rows, K / 16) registers

    @staticmethod
    def a(mma: cute.TiledMma, thread, tensor: cute.Tensor) -> "SharedOperand":
        """tensor: (m, k, stages)"""
        atom = _ldmatrix(tensor, transpose=False)
        fragment = mma.make_fragment_A(mma.get_slice(thread).partition_A(tensor[None, None, 0]))
        return SharedOperand._of(cute.make_tiled_copy_A(atom, mma), thread, tensor, fragment)

    @staticmethod
    def b(mma: cute.TiledMma, thread, tensor: cute.Tensor, transpose: bool) -> "SharedOperand":
        """tensor: (n, k, stages); transpose: n is what lies contiguous."""
        atom = _ldmatrix(tensor, transpose)
        fragment = mma.make_fragment_B(mma.get_slice(thread).partition_B(tensor[None, None, 0]))
        return SharedOperand._of(cute.make_tiled_copy_B(atom, mma), thread, tensor, fragment)

    @staticmethod
    def _of(copy, thread, tensor: cute.Tensor, fragment: cute.Tensor) -> "SharedOperand":
        return SharedOperand(copy, copy.get_slice(thread).partition_S(tensor), fragment)

    def load(self, k, stage):
        """Step k of K of a stage: shared memory -> registers."""
        registers = self.copy.retile(self.fragment)
        source = self.source[None, None, k, stage]
        cute.copy(self.copy, source, registers[None, None, k])

    def rows(self, k, m) -> cute.Tensor:
        """(MMA, 1): the m-th 16 rows at step k of K."""
        one = self.fragment[None, m, k]
        layout = cute.append(one.layout, cute.make_layout(1))
        return cute.make_tensor(one.iterator, layout)

    def __getitem__(self, k) -> cute.Tensor:
        return self.fragment[None, None, k]


def _ldmatrix(tensor: cute.Tensor, transpose: bool) -> cute.CopyAtom:
    return cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose, 4), tensor.element_type)


def multiply(mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor):
    """acc ((2, 2, N/8), 1, 1) += a (MMA, 1) b (MMA, N/8)^T, 16 of K."""
    fragment = as_fragment(acc)
    cute.gemm(mma, fragment, a, b, fragment)
