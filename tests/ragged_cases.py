"""Calls with sequences of different lengths: how they lie in memory, and which the tests make."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .cases import DTYPES, MASKS, Bordered, CallCase, pairwise

SLACK = (3, 0, 130, 1)  # rows that sequences have and do not use, in turn
TAIL = 5  # rows of a packed tensor that belong to no sequence


@dataclass(frozen=True)
class Rows:
    """Where the sequences lie in a tensor of queries or of keys.

    packed: one after another.  slack: so, but seqused says that some rows do not count.
    dense: the first rows of the entries of a batch, as seqused says.
    """

    kind: str
    lengths: tuple[int, ...]

    @property
    def allotted(self) -> list[int]:
        if self.kind == "dense":
            return [max(self.lengths) + 2] * len(self.lengths)
        slack = itertools.cycle(SLACK if self.kind == "slack" else (0,))
        return [length + more for length, more in zip(self.lengths, slack, strict=False)]

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """Batch entry, first row and end of each sequence."""
        if self.kind == "dense":
            return [(i, 0, length) for i, length in enumerate(self.lengths)]
        starts = [0, *itertools.accumulate(self.allotted)]
        ends = zip(starts, self.lengths, strict=False)
        return [(0, start, start + length) for start, length in ends]

    @property
    def shape(self) -> tuple[int, int]:
        """Entries of the batch, 1 of packed tensors, and rows."""
        if self.kind == "dense":
            return len(self.lengths), self.allotted[0]
        return 1, sum(self.allotted) + TAIL

    def arguments(self, side: str, device) -> dict:
        """cu_seqlens, seqused and max_seqlen of this side of flash_attn_varlen_func."""
        cu = used = None
        if self.kind != "dense":
            cu = torch.tensor([0, *itertools.accumulate(self.allotted)])
        if self.kind != "packed":
            used = torch.tensor(self.lengths)
        numbers = {f"cu_seqlens_{side}": cu, f"seqused_{side}": used}
        given = {n: None if x is None else x.to(device, torch.int32) for n, x in numbers.items()}
        return given | {f"max_seqlen_{side}": max(self.allotted)}

    def bordered(self, values: Tensor, layout: str) -> Bordered:
        """values (entries, rows, h, d), with NaN in the rows that do not count."""
        counts = torch.zeros(values.shape[:2], dtype=torch.bool)
        for entry, start, end in self.spans:
            counts[entry, start:end] = True
        bits = values.view(Bordered.BITS[values.element_size()])
        bits.masked_fill_(~counts[..., None, None].to(values.device), Bordered.POISON)
        return Bordered(values, layout)

    def given(self, tensor: Tensor) -> Tensor:
        """As the call takes it: packed tensors have no batch."""
        return tensor if self.kind == "dense" else tensor[0]

    def blocks(self, scales: Tensor, block: int) -> Iterator[Tensor]:
        """Those of each sequence in scales (b or 1, heads, blocks)."""
        for i, (entry, start, end) in enumerate(self.spans):
            first = 0 if self.kind == "dense" else start // block + i
            yield scales[entry : entry + 1, :, first : first - (start - end) // block]

    def each(self, tensor: Tensor, row_dim: int = 1) -> Iterator[Tensor]:
        """What belongs to each sequence of a tensor (entries, rows, ..), as a batch of one."""
        for entry, start, end in self.spans:
            yield tensor[entry : entry + 1].narrow(row_dim, start, end - start)


@dataclass(frozen=True)
class RaggedCase(CallCase):
    """One call of flash_attn_varlen_func; its repr is an expression that makes it again."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    rows_q: str = "packed"
    rows_k: str = "packed"
    dtype: str = "bf16"
    head_dim: int = 64
    head_dim_v: int = 64
    h_q: int = 2
    h_k: int = 2
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    layout: str = "bshd"
    softmax_scale: float | None = None
    num_ctas: int | None = None  # None: one per SM
    num_splits: int = 1

    def __str__(self):
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if self._differs(f))
        return f"{type(self).__name__}({', '.join(shown)})"

    def _differs(self, field) -> bool:
        return getattr(self, field.name) != field.default

    @property
    def queries(self) -> Rows:
        return Rows(self.rows_q, self.lengths_q)

    @property
    def keys(self) -> Rows:
        return Rows(self.rows_k, self.lengths_k)

    def inputs(self, device) -> tuple[Bordered, Bordered, Bordered]:
        """q, k and v: normal numbers where rows count."""

        def tensor(rows, heads, width):
            values = torch.randn(*rows.shape, heads, width).to(DTYPES[self.dtype])
            return rows.bordered(values.to(device), self.layout)

        return (
            tensor(self.queries, self.h_q, self.head_dim),
            tensor(self.keys, self.h_k, self.head_dim),
            tensor(self.keys, self.h_k, self.head_dim_v),
        )

    def arguments(self, device) -> dict:
        """All arguments but tensors of numbers."""
        lengths = self.queries.arguments("q", device) | self.keys.arguments("k", device)
        return lengths | {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window,
            "num_splits": self.num_splits,
        }


# Tiles of q and k, of v; with each the index in MASKS. Every tile is there, and every kind of mask.
KERNELS = (
    ("bf16", (64, 64), (0, 1)),
    ("fp16", (96, 88), (3, 4)),
    ("bf16", (128, 128), (0, 0)),
    ("fp16", (120, 104), (1, 1)),
    ("bf16", (128, 120), (2, 4)),
    ("bf16", (192, 128), (1, 1)),
    ("fp16", (192, 184), (0, 0)),
    ("bf16", (256, 248), (2, 3)),
)
LENGTHS = (  # of q, of k
    ((100, 100, 100), (100, 100, 100)),
    ((1, 65, 128, 127), (300, 64, 129, 1)),
    ((0, 70, 5, 0, 130), (40, 0, 33, 0, 200)),
    ((200,), (333,)),
    ((1, 1, 1), (7, 300, 64)),
    ((3, 257, 0, 2), (150, 257, 9, 20)),
)
FACTORS = {
    "kernel": KERNELS,
    "mask": (0, 1),
    "lengths": LENGTHS,
    "rows": (("packed", "packed"), ("slack", "slack"), ("dense", "packed"), ("slack", "dense")),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "layout": ("bshd", "bhsd", "sbhd", "packed"),
    "scale": (None, 0.3),
    "num_ctas": (None, 3),
}


def covering(seed: int = 1) -> list[RaggedCase]:
    """Any two values of two factors meet, in the order of their kernels."""
    cases = []
    for row in pairwise(FACTORS, seed):
        dtype, dims, masks = row["kernel"]
        causal, window = MASKS[masks[row["mask"]]]
        cases.append(
            RaggedCase(
                *row["lengths"],
                *row["rows"],
                dtype,
                *dims,
                *row["heads"],
                causal,
                window,
                row["layout"],
                row["scale"],
                row["num_ctas"],
            )
        )
    kernels = [(dtype, dims) for dtype, dims, _ in KERNELS]

    def place(case: RaggedCase) -> tuple:
        return kernels.index((case.dtype, (case.head_dim, case.head_dim_v))), repr(case)

    return sorted(cases, key=place)
