"""Signature: every compile-time fact of an attention problem, and nothing else."""

from dataclasses import dataclass, replace
from typing import Literal

HEAD_DIM_TILES = (64, 96, 128, 192, 256)
Q_BLOCK = 128  # queries per scale of one-byte q
PAGE_ROWS = (1, 8, 16, 32, 64, 128)
UNBOUNDED = 1 << 30  # a window side without a bound; beyond every length, far from Int32's end

MaskKind = Literal["full", "causal", "local"]
ScoreKind = Literal["softcap"]
DTypeName = Literal["bf16", "fp16"]
ByteName = Literal["e4m3", "e5m2", "int8"]


def head_dim_tile(head_dim: int) -> int:
    """The tile that holds `head_dim` columns; TMA fills the columns beyond it with zeros."""
    for tile in HEAD_DIM_TILES:
        if head_dim <= tile:
            return tile
    raise ValueError(f"head_dim {head_dim} is larger than the widest tile {HEAD_DIM_TILES[-1]}")


@dataclass(frozen=True)
class Quantised:
    """What one-byte inputs add to a Signature."""

    k: ByteName  # dtype of k; q is e4m3, or int8 where k is
    v: ByteName  # dtype of v, e4m3 or e5m2
    out: Literal["bf16", "fp16", "fp32"]
    k_block: Literal[0, 64, 128] = 0  # keys per scale of k; 0: a scale per head
    v_block: Literal[0, 64, 128] = 0  # keys per scale of v; 0: scales per head or channel

    def __post_init__(self):
        for name, allowed in (
            ("k", ("e4m3", "e5m2", "int8")),
            ("v", ("e4m3", "e5m2")),
            ("out", ("bf16", "fp16", "fp32")),
            ("k_block", (0, 64, 128)),
            ("v_block", (0, 64, 128)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {allowed}")


@dataclass(frozen=True)
class Signature:
    """What a kernel is compiled for.

    Lengths, strides, batch, head counts, the true head dims (within the tiles), the softmax scale,
    the softcap, the window sizes and the number of splits are run-time values: two calls that
    differ only in them share a kernel.
    """

    dtype: DTypeName | ByteName  # of q; without `quantised` also of k, v and out
    head_dim: int  # tile of q and k, one of HEAD_DIM_TILES
    head_dim_v: int  # tile of v and out, one of HEAD_DIM_TILES
    mask: MaskKind  # full; causal: bottom-right aligned; local: a window with two run-time bounds
    quantised: Quantised | None = None  # for one-byte q, k and v
    is_ragged: bool = False  # sequences have lengths of their own, which live on the device
    score: ScoreKind | None = None  # what scaled scores go through ahead of the mask
    sinks: bool = False  # a score without a value in each row's sum
    page_rows: int = 0  # k and v are pages of multiples of so many rows; 0: they are not pages
    is_split: bool = False  # each head's keys are split; the results are partial, in fp32
    packs_heads: bool = (
        False  # rows of q are heads of a query, several of each; not if mask is full
    )
    widens: Literal["e4m3"] | None = None  # dtype of k and v in memory, beside 16-bit q

    def __post_init__(self):
        for name in ("head_dim", "head_dim_v"):
            if getattr(self, name) not in HEAD_DIM_TILES:
                raise ValueError(
                    f"{name}={getattr(self, name)} is none of the tiles {HEAD_DIM_TILES}"
                )
        allowed = ("bf16", "fp16") if self.quantised is None else ("e4m3", "int8")
        if self.dtype not in allowed:
            raise ValueError(f"dtype={self.dtype!r} is neither {allowed[0]!r} nor {allowed[1]!r}")
        if self.quantised is not None and (self.dtype == "int8") != (self.quantised.k == "int8"):
            raise ValueError(f"dtype={self.dtype!r} does not go with k of {self.quantised.k!r}")
        if self.mask not in ("full", "causal", "local"):
            raise ValueError(f"mask={self.mask!r} is none of 'full', 'causal', 'local'")
        if self.score not in (None, "softcap"):
            raise ValueError(f"score={self.score!r} is neither None nor 'softcap'")
        if self.page_rows not in (0, *PAGE_ROWS) or (self.page_rows and not self.is_ragged):
            raise ValueError(
                f"page_rows={self.page_rows} with is_ragged={self.is_ragged}, expected 0, or "
                f"is_ragged=True and one of {PAGE_ROWS}"
            )
        if self.widens not in (None, "e4m3") or (self.widens and self.quantised):
            raise ValueError(
                f"widens={self.widens!r} with quantised={self.quantised}, expected None, or 'e4m3' "
                "with quantised=None"
            )
        if self.is_split and self.quantised is not None and self.quantised.out != "fp32":
            raise ValueError(f"is_split=True does not go with out of {self.quantised.out!r}")

    @property
    def gathers(self) -> bool:
        """Pages may hold any number of rows: rows of k and v are brought one by one."""
        return self.page_rows == 1

    def split(self) -> "Signature":
        """The same with partial results."""
        quantised = self.quantised and replace(self.quantised, out="fp32")
        return replace(self, quantised=quantised, is_split=True)
