"""AppendSignature: what the kernel that appends keys and values to a cache is compiled for."""

from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES = 16  # that a thread moves at once

RotaryKind = Literal["halves", "interleaved"]


@dataclass(frozen=True)
class AppendSignature:
    """Compile-time facts; lengths, strides, heads and head dims are run-time values."""

    dtype: Literal["bf16", "fp16", "e4m3", "byte"]  # bytes that nobody rotates are moved as such
    rotary: RotaryKind | None  # columns i and i + n / 2 turn together, or 2 i and 2 i + 1
    appends: bool = True  # k and v to a cache; else q is rotated and no more
    narrows: Literal["e4m3"] | None = None  # dtype of the cache, where it is not that of k and v

    def __post_init__(self):
        if self.rotary not in (None, "halves", "interleaved"):
            raise ValueError(f"rotary={self.rotary!r} is none of None, 'halves', 'interleaved'")
        if self.rotary and self.dtype == "byte":
            raise ValueError("rotary with dtype='byte', expected 'e4m3' or 16-bit elements")
        if self.dtype == "e4m3" and not self.rotary:
            raise ValueError("dtype='e4m3' without rotary, expected 'byte'")
        if not self.appends and self.rotary is None:
            raise ValueError("appends=False without rotary, expected one of them")

        if self.narrows not in (None, "e4m3") or (
            self.narrows and (self.dtype in ("e4m3", "byte") or not self.appends)
        ):
            raise ValueError(
                f"narrows={self.narrows!r} with dtype={self.dtype!r} and appends={self.appends}, "
                "expected None, or 'e4m3' for 16-bit elements that are appended"
            )

    @property
    def chunk(self) -> int:
        """Elements that a thread moves at once; of what turns, a divisor of half the columns."""
        return CHUNK_BYTES // (1 if self.dtype == "byte" else 2)


@dataclass(frozen=True)
class AppendConfig:
    num_threads: int = 256
    ctas_per_sequence: int = 8  # at most; they stride over what is longer
