"""Case: one attention problem of the sweep, and its work in floating-point operations."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch

TOKENS = 16_384  # the setting of the FlashAttention-3 paper: batch * length
HIDDEN = 2_048  # and heads * head dim
HEAD_DIMS = (64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
PASSES = ("forward", "forward fp8", "backward", "forward and backward")
FORWARD, FORWARD_FP8, BACKWARD, TRAINING = PASSES
# operations, in those of the forward pass: its two products of a pair, and five more
WORK = {FORWARD: 1.0, FORWARD_FP8: 1.0, BACKWARD: 2.5, TRAINING: 3.5}


@dataclass(frozen=True)
class Case:
    """Self-attention of `batch` sequences; q, k, v and out are (batch, length, heads, head_dim)."""

    dtype: str  # one of DTYPES
    head_dim: int
    causal: bool
    length: int
    batch: int
    heads: int
    window: tuple[int, int] = (-1, -1)  # keys visible to the left and right; -1: all of them
    gradients: str = ""  # BACKWARD or TRAINING, else only the output is made

    @classmethod
    def paper(  # noqa: PLR0913
        cls, dtype: str, head_dim: int, causal: bool, length: int, gradients: str = ""
    ) -> "Case":
        """16k tokens in all, hidden size 2048; one sequence where it alone is longer."""
        batch, heads = max(TOKENS // length, 1), HIDDEN // head_dim
        return cls(dtype, head_dim, causal, length, batch, heads, gradients=gradients)

    @property
    def of_pass(self) -> str:
        return self.gradients or (FORWARD_FP8 if self.dtype == "e4m3" else FORWARD)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.length, self.heads, self.head_dim

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        if self.window != (-1, -1):
            mask = f"window {self.window}"
        return f"{self.dtype} d{self.head_dim} {mask} {self.length}"


def paper_cases(
    dtypes: Iterable[str],
    head_dims: Iterable[int],
    causal: Iterable[bool],
    lengths: Iterable[int],
    passes: Iterable[str] = PASSES,
) -> list[Case]:
    """Pass after pass; e4m3 has no gradients."""
    grid = list(product(dtypes, head_dims, causal, lengths))
    every = [Case.paper(*facts) for facts in grid]
    for gradients in (BACKWARD, TRAINING):
        every += [Case.paper(*facts, gradients) for facts in grid if facts[0] != "e4m3"]
    return [case for case in every if case.of_pass in passes]


def visible_pairs(s_q: int, s_k: int, left: int, right: int) -> int:
    """How many (query, key) pairs a window lets through; -1 is no bound.

    Query i stands at key i + s_k - s_q, and sees the keys from `left` before to `right` after it.
    """
    total = 0
    for i in range(s_q):
        centre = i + s_k - s_q
        first = 0 if left < 0 else max(0, centre - left)
        last = s_k - 1 if right < 0 else min(s_k - 1, centre + right)
        total += max(0, last - first + 1)
    return total


def flops(case: Case) -> float:
    """Operations: two matrix products of 2 * head_dim per visible pair, of gradients five.

    Causal attention counts half of all pairs, as the FlashAttention papers do, although
    (length + 1) / (2 * length) of them are visible. A window counts its pairs exactly.
    """
    if case.window != (-1, -1):
        left, right = case.window
        pairs = visible_pairs(case.length, case.length, left, 0 if case.causal else right)
    else:
        pairs = case.length**2 * (0.5 if case.causal else 1.0)
    return 4.0 * case.batch * case.heads * case.head_dim * pairs * WORK[case.of_pass]
