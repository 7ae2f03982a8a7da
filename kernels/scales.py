"""Scales: the factors of one-byte inputs, and where a tile finds its own.

    value = byte * scale        V: value = byte * scale + shift

A scale of Q belongs to 128 queries of a head, one of K or V to 64 or 128 keys; a tensor that holds
one scale per head has a single block.  Scales of V may also belong to its channels, as its shifts
do: the weights of a row add up to 1, so that its O is what the bytes give, plus the shift.
"""

import math
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from .arithmetic import minimum
from .sequence import Sequence
from .signature import Q_BLOCK, Quantised

# Added to the factors of blocks that a mask hides in part: -inf times a factor of 0 would be NaN.
TINY = 2.0**-126  # changes no factor above 2^-102


@dataclass(frozen=True)
class Scales:
    """The tensors of a call, with the mode that a tile slices first."""

    q: cute.Tensor  # (blocks, h_q or h_k, b) fp32
    k: cute.Tensor  # (blocks, h_k, b) fp32
    v: cute.Tensor  # (blocks, h_k, b) fp32, or by channel (dv, h_k, b)
    v_shift: cute.Tensor  # (dv, h_k, b) fp32, channels side by side and aligned to 16 bytes

    def of_tile(self, tile, sequence: Sequence, row, num_heads, scale_log2, plan) -> "TileScales":  # noqa: PLR0913
        """Those of a tile and of the 128 queries that `row` is one of."""
        quantised = plan.signature.quantised
        head = tile.head // (num_heads // self.q.shape[1])  # h_k scales serve h_q heads
        of_queries = sequence.queries.blocks(self.q, head, Q_BLOCK)
        q = of_queries[minimum(row // Q_BLOCK, of_queries.shape[0] - 1)]
        k = self._of_keys(self.k, sequence, tile.head_kv, quantised.k_block)
        v = self._of_keys(self.v, sequence, tile.head_kv, quantised.v_block)
        if quantised.k_block == 0:
            q = q * k[0]
        has_keys = sequence.s_k > 0 if plan.signature.is_ragged else None
        return TileScales(scale_log2 * q + TINY, k, v, plan.tile_n, quantised, has_keys)

    def _of_keys(self, tensor: cute.Tensor, sequence: Sequence, head_kv, block: int):
        if block == 0:
            return sequence.vector(tensor, head_kv)
        return sequence.keys.blocks(tensor, head_kv, block)


@dataclass(frozen=True)
class HeadScales:
    """Of one-byte K and V beside 16-bit Q: one for each sequence and head."""

    k: cute.Tensor  # (h_k, b) fp32
    v: cute.Tensor

    def of_head(self, tile) -> tuple[Float32, Float32]:
        return tuple(x[tile.head_kv, tile.batch] for x in (self.k, self.v))


@dataclass(frozen=True)
class TileScales:
    """The scales that a thread needs for one query tile."""

    q_log2: Float32  # of its queries, times softmax_scale * log2(e) and a scale of all keys
    k: cute.Tensor  # (blocks,)
    v: cute.Tensor  # (blocks,), or (dv,) if the scales belong to channels
    tile_n: cutlass.Constexpr[int]
    quantised: cutlass.Constexpr[Quantised]
    has_keys: Any  # Boolean, or None: it has

    def of_scores(self, n_block, is_masked: bool) -> tuple:
        """A factor per equal part of a block's columns; above 0 if some scores are hidden."""
        block, tile_n = self.quantised.k_block, self.tile_n
        if block == 0:
            return (self.q_log2,)
        first = n_block * tile_n
        starts = range(0, tile_n, math.gcd(block, tile_n))
        factors = tuple(self.q_log2 * self._at(self.k, (first + i) // block) for i in starts)
        return tuple(factor + TINY for factor in factors) if is_masked else factors

    def of_values(self, n_block) -> Float32:
        """The scale of V in a block of keys; 1 if its scales belong to heads or channels."""
        if self.quantised.v_block == 0:
            return Float32(1.0)
        return self._at(self.v, n_block * self.tile_n // self.quantised.v_block)

    def _at(self, scales: cute.Tensor, block) -> Float32:
        scale = scales[minimum(block, scales.shape[0] - 1)]
        if self.has_keys is None:
            return scale
        return cutlass.select_(self.has_keys, scale, Float32(1.0))  # there is none to be read
