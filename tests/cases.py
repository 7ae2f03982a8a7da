"""Which calls the accuracy tests make: a covering of all pairs of features, not their product."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from fa3.kernels.arguments import FwdArguments
from fa3.kernels.signature import head_dim_tile
from perf import variants

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def kernel_arguments(**given) -> list:
    """The fields of FwdArguments: those given, by name; of a call without the others."""
    given = {"softcap_log2": 0.0} | given
    return [given.get(field.name) for field in fields(FwdArguments)]


class CallCase:
    """What cases of a call share: they print as the expression that makes them again."""

    def __str__(self):
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        changed = (f"{name}={value!r}" for name, value, default in values if value != default)
        return f"{type(self).__name__}({', '.join(changed)})"

    @property
    def mask(self) -> dict:
        return {"causal": self.causal, "window": self.window}

    def learnable_sink(self, device) -> torch.Tensor | None:
        """About as large as a sum of a hundred keys; NaN between the elements if strided."""
        if self.sink is None:
            return None
        shape = (self.batch, self.h_q) if self.sink == "batch" else (self.h_q,)
        sink = (4.0 + 2.0 * torch.randn(shape)).to(DTYPES.get(self.sink, torch.float32)).to(device)
        if self.sink == "strided":
            sink = torch.stack([torch.full_like(sink, math.nan), sink], dim=-1)[..., 1]
        return sink


@dataclass(frozen=True)
class Case(CallCase):
    """One call of flash_attn_func; its repr is an expression that makes it again."""

    dtype: str = "bf16"
    head_dim: int = 64
    head_dim_v: int = 64
    batch: int = 1
    h_q: int = 2
    h_k: int = 2
    s_q: int = 128
    s_k: int = 128
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    layout: str = "bshd"
    softmax_scale: float | None = None
    num_ctas: int | None = None  # None: one per SM
    softcap: float = 0.0
    sink: str | None = None  # one of SINKS
    num_splits: int = 1


class Bordered:
    """A tensor in the layout of a case, with NaN in all the memory around and between its rows.

    values: (b, s, h, d). tensor: the same values, with the strides of the layout.
    Integers have no NaN: all their bits are set, too.
    """

    # layout -> order of the dimensions in memory, gaps between rows
    LAYOUTS = {
        "bshd": ((0, 1, 2, 3), False),
        "bhsd": ((0, 2, 1, 3), False),  # as nn.MultiheadAttention transposes
        "sbhd": ((1, 0, 2, 3), False),  # sequence first
        "packed": ((0, 1, 2, 3), True),  # a slice of a tensor that holds q, k and v
        "expanded": ((0, 1, 2, 3), False),  # one batch entry for all
    }
    BORDER = 64  # elements before and after; a multiple of 16 bytes
    BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by element size
    POISON = -1  # as bits

    def __init__(self, values: torch.Tensor, layout: str):
        order, gaps = self.LAYOUTS[layout]
        if layout == "expanded":
            values = values[:1].expand_as(values)
        self.values = values
        stored = values[:1] if layout == "expanded" else values
        sizes = [stored.shape[i] for i in order]
        if gaps:
            sizes[2:] = [sizes[2] + 2, sizes[3] + 16]
        count = math.prod(sizes)
        bits = torch.full(
            (count + 2 * self.BORDER,), self.POISON, dtype=self._bits_of(values.dtype)
        )
        self.memory = bits.to(values.device).view(values.dtype)
        view = self.memory[self.BORDER : self.BORDER + count].view(sizes)
        if gaps:
            view = view[:, :, 1:-1, : stored.shape[3]]
        view = view.permute([order.index(i) for i in range(4)])
        view.copy_(stored)
        self.tensor = view.expand_as(values)

    def assert_border_untouched(self, name: str):
        bits = self.memory.view(self._bits_of(self.memory.dtype)).clone()
        offset = self.tensor.storage_offset()
        bits.as_strided(self.tensor.shape, self.tensor.stride(), offset).fill_(self.POISON)
        written = (bits != self.POISON).sum().item()
        assert written == 0, f"{name}: {written} elements outside of the tensor were written"

    def _bits_of(self, dtype: torch.dtype) -> torch.dtype:
        return self.BITS[dtype.itemsize]


def make_inputs(case: Case, device: torch.device) -> tuple[Bordered, Bordered, Bordered]:
    """q, k and v of a case: normal numbers."""

    def tensor(length, heads, width, layout):
        values = torch.randn(case.batch, length, heads, width).to(DTYPES[case.dtype])
        return Bordered(values.to(device), layout)

    q_layout = "bshd" if case.layout == "expanded" else case.layout
    return (
        tensor(case.s_q, case.h_q, case.head_dim, q_layout),
        tensor(case.s_k, case.h_k, case.head_dim, case.layout),
        tensor(case.s_k, case.h_k, case.head_dim_v, case.layout),
    )


def pairwise(factors: dict[str, Sequence], seed: int) -> list[dict]:
    """Few rows such that any two values of any two factors meet in one of them.

    Greedy: each row starts from a pair that has not met yet and takes, factor by factor, the value
    that meets most others for the first time.
    """
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    }
    rows = []
    while missing:
        row = dict(min(missing, key=repr))
        others = [name for name in names if name not in row]
        rng.shuffle(others)
        for name in others:
            values = list(factors[name])
            rng.shuffle(values)
            row[name] = max(values, key=lambda value: _new_pairs(row, name, value, missing, names))
        missing -= set(itertools.combinations([(name, row[name]) for name in names], 2))
        rows.append(row)
    return rows


def _new_pairs(row, name, value, missing, names) -> int:
    place = names.index(name)
    count = 0
    for other, chosen in row.items():
        pair = ((other, chosen), (name, value))
        count += (pair if names.index(other) < place else pair[::-1]) in missing
    return count


# Head dims of q and k, of v. Together they use seven pairs of tiles.
HEAD_DIMS = (
    (64, 64),
    (40, 8),
    (96, 96),
    (72, 88),
    (128, 128),
    (104, 120),
    (192, 192),
    (256, 256),
    (248, 200),
    (192, 128),
    (64, 128),
)
MASKS = (  # causal, window
    (False, (-1, -1)),
    (True, (-1, -1)),
    (False, (30, 20)),
    (True, (100, -1)),
    (False, (-1, 40)),
)
LENGTHS = (  # s_q, s_k
    (1, 1),
    (1, 300),
    (64, 64),
    (127, 129),
    (192, 384),
    (200, 333),
    (257, 95),
    (300, 300),
)
HEADS = ((2, 2), (4, 2), (3, 1), (6, 2))  # h_q, h_k
FACTORS = {
    "dims": HEAD_DIMS,
    "mask": MASKS,
    "lengths": LENGTHS,
    "heads": HEADS,
    "layout": tuple(Bordered.LAYOUTS),
    "batch": (1, 2),
    "scale": (None, 0.3),
    "num_ctas": (None, 3),
}
SINKS = (None, "fp32", "bf16", "fp16", "strided", "batch")
# Kernels with a function of scores or a sink differ from the others in little: they have cases of
# their own, on fewer tiles.
SCORE_FACTORS = {
    "dims": ((64, 64), (104, 120), (256, 256)),
    "mask": MASKS[:3],
    "softcap": (0.0, 50.0, 20.0),
    "sink": SINKS,
    "lengths": ((127, 129), (200, 333), (257, 95)),
    "heads": ((2, 2), (6, 2)),
    "layout": ("bshd", "packed"),
    "scale": (None, 3.0),  # scores of about 1, or of twice the cap
    "num_ctas": (None, 3),
}


def kind_of(mask: tuple) -> str:
    """The kind of mask that a kernel is compiled for."""
    causal, (left, right) = mask
    right = 0 if causal else right
    return "local" if left >= 0 or right > 0 else "causal" if right == 0 else "full"


def dtype_of(dims: tuple[int, int], mask: tuple) -> str:
    return variants.dtype_of(tuple(map(head_dim_tile, dims)), kind_of(mask))


def covering(factors: dict[str, Sequence] = FACTORS, seed: int = 1) -> list[Case]:
    """The cases of the forward accuracy tests, in the order of their kernels."""
    cases = []
    for row in pairwise(factors, seed):
        (head_dim, head_dim_v), (causal, window) = row["dims"], row["mask"]
        cases.append(
            Case(
                dtype=dtype_of(row["dims"], row["mask"]),
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                batch=2 if row["layout"] == "expanded" else row.get("batch", 2),
                h_q=row["heads"][0],
                h_k=row["heads"][1],
                s_q=row["lengths"][0],
                s_k=row["lengths"][1],
                causal=causal,
                window=window,
                layout=row["layout"],
                softmax_scale=row["scale"],
                num_ctas=row["num_ctas"],
                softcap=row.get("softcap", 0.0),
                sink=row.get("sink"),
            )
        )
    return sorted(cases, key=lambda c: (c.head_dim, c.head_dim_v, c.causal, c.window, repr(c)))
