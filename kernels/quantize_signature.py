"""QuantizeSignature and QuantizeConfig: what the quantisation kernel is compiled for, and how."""

from dataclasses import dataclass
from typing import Literal

from .signature import ByteName, DTypeName

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}  # the code of a block's largest value
LARGEST_FLOAT = (2 - 2.0**-23) * 2.0**127  # of fp32
# The least descale, fp32's least normal number: its reciprocal is finite. It takes the place of
# smaller ones, which only blocks of bf16 below 448 * 2^-126 (5e-36) could have.
SMALLEST_DESCALE = 2.0**-126

CHUNK = 16  # columns of a thread: two 16-byte loads of 16-bit elements, one 16-byte store

# block: a descale per block of rows, computed and written.
# given: factors 1 / descale per channel are read.
# amax:  no bytes, only the largest magnitude of each channel in each block of rows is written.
# sum:   no bytes, only the sum of each channel in each block of rows is written.
ScaleMode = Literal["block", "given", "amax", "sum"]


def sign_of(column: int) -> int:
    """Diagonal of signs in front of the Hadamard rotation, (-1)^(b0 b1 + b2 b3 + b4 b5 + b6 b7).

    b0 .. b7 are the bits of the column. This function is bent: where d is an even power of two its
    rotation spreads not only an outlier channel over all columns evenly, as any signs do, but also
    a row that is constant over the channels, alternates or is any other Walsh function, which
    without signs would become one outlier. Random signs spread those only on average; for an odd
    power of two half of the columns get all.
    """
    return -1 if (column & column >> 1 & 0x55).bit_count() % 2 else 1


@dataclass(frozen=True)
class QuantizeSignature:
    """Compile-time facts of quantising one tensor (b, s, h, d).

    A ragged one has sequences with lengths of their own (kernels/sequence.py), as forward kernels
    have them; of a packed one b is 1.
    """

    dtype: DTypeName
    out: ByteName
    head_dim: int  # a multiple of CHUNK
    rows: Literal[64, 128]  # of a block, the rows of one scale
    scales: ScaleMode = "block"
    hadamard: bool = False  # rows are rotated: signs, then Walsh-Hadamard, by 1 / sqrt(d)
    subtract_mean: bool = False  # a row given per batch entry and head is subtracted first
    dot_with_mean: bool = False  # the product of each row, as it came, with that given row
    sum_errors: bool = False  # what the codes of a channel lack in each block is written, too
    is_ragged: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("dtype", ("bf16", "fp16")),
            ("out", tuple(LARGEST)),
            ("rows", (64, 128)),
            ("scales", ("block", "given", "amax", "sum")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {allowed}")
        if self.head_dim <= 0 or self.head_dim > 256 or self.head_dim % CHUNK:
            raise ValueError(
                f"head_dim={self.head_dim} is no multiple of {CHUNK} from {CHUNK} to 256"
            )
        if self.sum_errors and (self.out == "int8" or not self.has_codes):
            raise ValueError(f"sum_errors is for codes of FP8, not {self.out!r} {self.scales!r}")
        if self.hadamard and self.head_dim & (self.head_dim - 1):
            raise ValueError(f"head_dim={self.head_dim} is no power of two, hadamard needs one")

    @property
    def has_codes(self) -> bool:
        return self.scales in ("block", "given")

    @property
    def has_mean(self) -> bool:
        return self.subtract_mean or self.dot_with_mean

    @property
    def lanes(self) -> int:
        """Threads that share a row: a power of two, the last of them idle where d is none."""
        return 1 << (self.head_dim // CHUNK - 1).bit_length()


@dataclass(frozen=True)
class QuantizeConfig:
    """One CTA per block of rows; its threads hold the block in registers."""

    most_rows_per_thread: int = 4

    def rows_per_thread(self, signature: QuantizeSignature) -> int:
        """Fewer where a warp would not be full."""
        return min(self.most_rows_per_thread, signature.rows * signature.lanes // 32)

    def num_threads(self, signature: QuantizeSignature) -> int:
        return signature.rows * signature.lanes // self.rows_per_thread(signature)

    def ctas_per_sm(self, signature: QuantizeSignature) -> int:
        """As many as registers allow without spills: one computes while others load."""
        threads = self.num_threads(signature)
        is_lean = not signature.has_mean and signature.out != "int8"  # needs 80 registers, not 96
        return max(1, (768 if is_lean and threads == 256 else 640) // threads)
