"""Scales: the factors of one-byte inputs, and where a tile finds its own.

    value = byte * scale

A scale of Q belongs to 128 queries of a head, one of K or V to 64 or 128 keys; a tensor that holds
one scale per head has a single block.  Scales of V may also belong to its channels.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .arithmetic import minimum
from .signature import Quantised

Q_BLOCK = 128  # queries per scale
KEY_GROUP = 64  # keys that are certain to share a scale
UNIT_STEP = 2.0**-60  # how far the unit of O may fall from one block of keys to the next


@dataclass(frozen=True)
class Scales:
    """The tensors of a call, with the mode that a tile slices first."""

    q: cute.Tensor  # (blocks, h_q or h_k, b) fp32
    k: cute.Tensor  # (blocks, h_k, b) fp32
    v: cute.Tensor  # (blocks, h_k, b) fp32, or by channel (dv, h_k, b)

    def of_queries(self, row, tile: Any, num_heads) -> Float32:
        """The scale of the 64 queries from `row` on."""
        blocks, heads, _ = self.q.shape
        block = minimum(row // Q_BLOCK, blocks - 1)
        return self.q[block, tile.head // (num_heads // heads), tile.batch]

    def of_keys(self, tile: Any, s_k, tile_n: int, quantised: Quantised) -> "KeyScales":
        k, v = (t[None, tile.head_kv, tile.batch] for t in (self.k, self.v))
        is_coarse = k.shape[0] * KEY_GROUP < s_k
        k_of_head = None if quantised.k_blocks else k[0]
        return KeyScales(k, v, k_of_head, Int32(is_coarse), tile_n, quantised)


@dataclass(frozen=True)
class KeyScales:
    """The scales of one head's keys."""

    k: cute.Tensor  # (blocks,)
    v: cute.Tensor  # (blocks,), or (dv,) if the scales belong to channels
    k_of_head: Float32 | None  # if k has no blocks
    shift: Any  # log2 of the key groups in a block of k
    tile_n: cutlass.Constexpr[int]
    quantised: cutlass.Constexpr[Quantised]

    @property
    def num_groups(self) -> int:
        """Parts of a tile that may differ in their scale of K."""
        return self.tile_n // KEY_GROUP if self.quantised.k_blocks else 1

    def of_scores(self, n_block) -> tuple[Float32, ...]:
        """The scale of K for each group of a tile's columns."""
        if self.k_of_head is not None:
            return (self.k_of_head,)
        first, last_block = n_block * self.num_groups, self.k.shape[0] - 1
        groups = range(self.num_groups)
        return tuple(self.k[minimum((first + g) >> self.shift, last_block)] for g in groups)

    def of_values(self, n_block) -> Float32 | None:
        """The scale of V in a tile; None if its scales belong to heads or channels."""
        if self.quantised.v_block == 0:
            return None
        block = n_block * self.tile_n // self.quantised.v_block
        return self.v[minimum(block, self.v.shape[0] - 1)]

    def of_output(self, unit: "OutputUnit") -> cute.Tensor:
        """What remains to be multiplied at the end: (1,), or (dv,) by channel."""
        return self.v if self.quantised.v_block == 0 else unit.scale


@dataclass(frozen=True)
class OutputUnit:
    """O is kept in units of the last block's scale of V, so that adding a block is one FMA."""

    scale: cute.Tensor  # (1,) fp32

    @staticmethod
    def of() -> "OutputUnit":
        return OutputUnit(cute.make_rmem_tensor(1, Float32))

    def start(self, scale: Float32 | None):
        """Before a tile's first product."""
        self.scale[0] = Float32(1.0) if scale is None else scale

    def change_to(self, scale: Float32 | None) -> Float32 | None:
        """What O must be multiplied by from now on.

        The unit falls by UNIT_STEP at most, so that O stays finite whatever the scales: a block
        that is smaller still counts too much, but no more than 2^-60 of what came before.
        """
        if scale is None:
            return None
        before = self.scale[0]
        self.scale[0] = cute.arch.fmax(scale, before * UNIT_STEP)
        return before * cute.arch.rcp_approx(self.scale[0])
