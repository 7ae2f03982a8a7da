"""The global tensors of a forward call, as kernels want them, and operands moved by TMA."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32


@dataclass(frozen=True)
class TmaOperand:
    """A TMA descriptor and the coordinate tensor that goes with it."""

    atom: cute.CopyAtom
    tensor: cute.Tensor


@dataclass(frozen=True)
class RowsOperand:
    """Pages whose rows are gathered (sm90/gather.py)."""

    tensor: cute.Tensor  # (page_size, columns, heads, pages)


@dataclass(frozen=True)
class FwdTensors:
    """Global tensors with the tiled modes first; heads of k and v are fewer under GQA."""

    q: TmaOperand  # (s_q, d, h_q, b)
    k: TmaOperand | RowsOperand  # (s_k, d, h_k, b)
    v: TmaOperand | RowsOperand  # (dv, s_k, h_k, b): transposed view, PV contracts over s_k
    o: TmaOperand | cute.Tensor  # (s_q, dv, h_q, b)
    lse: cute.Tensor  # (s_q, h_q, b) fp32; of partial results as many heads as splits, as of o
    scales: Any = None  # Scales, of FP8 inputs
    lengths: Any = None  # lengths.GivenLengths, of ragged sequences
    sinks: cute.Tensor | None = None  # (h_q, b) fp32

    @property
    def tma_atoms(self) -> list[cute.CopyAtom]:
        operands = (self.q, self.k, self.v, self.o)
        return [operand.atom for operand in operands if isinstance(operand, TmaOperand)]

    def sink_of(self, tile) -> Float32 | None:
        return None if self.sinks is None else self.sinks[tile.head, tile.batch]


@dataclass(frozen=True)
class FwdScalars:
    """Run-time numbers of a forward call."""

    scale_log2: Float32  # softmax_scale * log2(e), with softcap times 2 / softcap
    softcap_log2: Float32  # softcap * log2(e)
    window_left: Int32
    window_right: Int32
    num_splits: Int32 | None = None  # of a head of q, where results are partial
    rows_per_query: Int32 | None = None  # heads that follow each other in the rows of q


def permute(tensor: cute.Tensor, modes: list[int]) -> cute.Tensor:
    """The same memory with its modes in another order."""
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=modes))
