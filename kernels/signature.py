"""Signature: every compile-time fact of an attention problem, and nothing else."""

from dataclasses import dataclass
from typing import Literal

HEAD_DIM_TILES = (64, 96, 128, 192, 256)
UNBOUNDED = 1 << 30  # a window side without a bound; beyond every length, far from Int32's end

MaskKind = Literal["full", "causal", "local"]
DTypeName = Literal["bf16", "fp16"]


def head_dim_tile(head_dim: int) -> int:
    """The tile that holds `head_dim` columns; TMA fills the columns beyond it with zeros."""
    for tile in HEAD_DIM_TILES:
        if head_dim <= tile:
            return tile
    raise ValueError(f"head_dim {head_dim} is larger than the widest tile {HEAD_DIM_TILES[-1]}")


@dataclass(frozen=True)
class Signature:
    """What a kernel is compiled for.

    Lengths, strides, batch, head counts, the true head dims (within the tiles), the softmax scale
    and the window sizes are run-time values: two calls that differ only in them share a kernel.
    """

    dtype: DTypeName  # of q, k, v and out
    head_dim: int  # tile of q and k, one of HEAD_DIM_TILES
    head_dim_v: int  # tile of v and out, one of HEAD_DIM_TILES
    mask: MaskKind  # full; causal: bottom-right aligned; local: a window with two run-time bounds

    def __post_init__(self):
        for name in ("head_dim", "head_dim_v"):
            if getattr(self, name) not in HEAD_DIM_TILES:
                raise ValueError(
                    f"{name}={getattr(self, name)} is none of the tiles {HEAD_DIM_TILES}"
                )
        if self.dtype not in ("bf16", "fp16"):
            raise ValueError(f"dtype={self.dtype!r} is neither 'bf16' nor 'fp16'")
        if self.mask not in ("full", "causal", "local"):
            raise ValueError(f"mask={self.mask!r} is none of 'full', 'causal', 'local'")
