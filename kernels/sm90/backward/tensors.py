"""The global tensors of a backward pass, as the Hopper kernels want them."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute

from ...tensors import TmaOperand


@dataclass(frozen=True)
class BwdTensors:
    """Global tensors with the tiled modes first; heads of k and v are fewer under GQA."""

    q: TmaOperand  # (s_q, d, h_q, b)
    k: TmaOperand  # (s_k, d, h_k, b)
    v: TmaOperand  # (s_k, dv, h_k, b)
    do: TmaOperand  # (s_q, dv, h_q, b)
    dk: TmaOperand | None  # (s_k, d, h_k, b)
    dv: TmaOperand | None  # (s_k, dv, h_k, b)
    row_stats: cute.Tensor  # (2 * tile_m, m_blocks, h_q, b) fp32
    delta_parts: cute.Tensor | None  # (8 * tile_m, m_blocks, h_q, b) bf16
    dq_sums: cute.Tensor | None  # (tile_m * tile_d, m_blocks, h_q, b) fp32
    dq_counters: cute.Tensor | None  # (warpgroups, m_blocks, h_q, b) Int32
    lengths: Any  # lengths.GivenLengths, of ragged sequences

    @property
    def tma_atoms(self) -> list[cute.CopyAtom]:
        operands = self.q, self.k, self.v, self.do, self.dk, self.dv
        return [operand.atom for operand in operands if operand is not None]
