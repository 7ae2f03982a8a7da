"""Calls of flash_attn_with_kvcache: what caches look like, and which the tests make."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from fa3.reference.append import narrowed, rotated

from . import reference
from .cases import DTYPES, Bordered, pairwise

POSITIONS, ANGLES = 600, 16  # rows and columns of rotary_cos


@dataclass(frozen=True)
class CacheCase:
    """One call of flash_attn_with_kvcache; its repr is an expression that makes it again.

    pages: keys per page; 0: a dense cache; -1: one that cache_batch_idx looks up.
    """

    lengths: tuple[int, ...] = (200, 37)  # of the caches, ahead of the call
    num_queries: tuple[int, ...] = (3, 3)  # one of each sequence; packed if they differ
    num_new: int = 0
    pages: int = 16
    rotary: str | None = None
    dtype: str = "bf16"
    head_dim: int = 64
    head_dim_v: int = 64
    h_q: int = 4
    h_k: int = 2
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    cache: str | None = None  # its dtype, e4m3 with scales per head; None: that of q
    leftpad: tuple[int, ...] | None = None

    def __str__(self):
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"CacheCase({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def is_packed(self) -> bool:
        return len(set(self.num_queries)) > 1

    @property
    def mask(self) -> dict:
        return {"causal": self.causal, "window": self.window}


@dataclass
class Call:
    """The tensors of a case. Slots of the caches that no key has hold NaN."""

    case: CacheCase
    device: torch.device
    q: list[Tensor] = field(init=False)  # of each sequence (n, h_q, d)
    k: list[Tensor] = field(init=False)  # its keys so far, (n, h_k, d)
    v: list[Tensor] = field(init=False)
    new_k: Tensor = field(init=False)  # (b, num_new, h_k, d)
    new_v: Tensor = field(init=False)

    def __post_init__(self):
        case = self.case
        dtype, b = DTYPES[case.dtype], len(case.lengths)

        def numbers(*shape):
            return torch.randn(shape).to(dtype).to(self.device)

        self.q = [numbers(n, case.h_q, case.head_dim) for n in case.num_queries]
        self.k = [numbers(n, case.h_k, case.head_dim) for n in case.lengths]
        self.v = [numbers(n, case.h_k, case.head_dim_v) for n in case.lengths]
        self.new_k = numbers(b, case.num_new, case.h_k, case.head_dim)
        self.new_v = numbers(b, case.num_new, case.h_k, case.head_dim_v)
        self.descales = {}
        if case.cache:
            scales = (
                torch.rand(b, 2 * case.h_k)[:, ::2].to(self.device) / 50 + 0.004 for _ in "kv"
            )
            self.descales = dict(zip(("k_descale", "v_descale"), scales, strict=True))
            self.k, self.v = (
                [self._codes(x, name, i) for i, x in enumerate(rows)]
                for name, rows in (("k_descale", self.k), ("v_descale", self.v))
            )
        angles = torch.randn(POSITIONS, ANGLES).to(self.device)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self._place()

    def _place(self):
        """Caches, and where row j of sequence i is in them: `places[i]` are pages and rows."""
        case, lengths = self.case, self.case.lengths
        ends = [n + case.num_new for n in lengths]
        if case.pages > 0:
            size, most = case.pages, max(-(-end // case.pages) for end in ends) + 1
            num_pages = sum(-(-end // size) for end in ends) + 2
            free = iter(torch.randperm(num_pages).tolist())
            self.table = torch.full((len(lengths), most), -1, dtype=torch.int32)
            for row, end in zip(self.table, ends, strict=True):
                for i in range(-(-end // size)):
                    row[i] = next(free)
        else:
            size, entries = max(ends) + 3, torch.arange(len(lengths))
            num_pages = len(lengths)
            if case.pages < 0:
                num_pages += 2
                entries = torch.randperm(num_pages)[: len(lengths)]
            self.table = entries[:, None].int()
        self.table = self.table.to(self.device)
        self.places = []
        for row, start, end in zip(self.table.tolist(), self.starts, ends, strict=True):
            j = torch.arange(start, end)
            self.places.append((torch.tensor(row)[j // size], j % size))
        self.k_cache = self._cache(num_pages, size, self.k)
        self.v_cache = self._cache(num_pages, size, self.v)

    def _cache(self, num_pages: int, size: int, rows: list[Tensor]) -> Bordered:
        shape = num_pages, size, *rows[0].shape[1:]
        values = torch.full(shape, torch.nan, device=self.device).to(rows[0].dtype)
        for (page, row), start, x in zip(self.places, self.starts, rows, strict=True):
            bits(values)[page[: len(x) - start], row[: len(x) - start]] = bits(x[start:])
        return Bordered(values, "bshd")

    def _codes(self, x: Tensor, name: str, i: int) -> Tensor:
        """Of rows of sequence i."""
        return narrowed(x, self.descales[name][i]).view(torch.float8_e4m3fn)

    def _values(self, codes: Tensor, name: str, i: int) -> Tensor:
        return codes.float() * self.descales[name][i][:, None] if self.descales else codes

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each sequence that counts."""
        return self.case.leftpad or (0,) * len(self.case.lengths)

    @property
    def seqlens(self) -> Tensor:
        return torch.tensor(self.case.lengths, dtype=torch.int32, device=self.device)

    def arguments(self) -> dict:
        """All but q."""
        case = self.case
        given = {
            "k_cache": self.k_cache.tensor,
            "v_cache": self.v_cache.tensor,
            "cache_seqlens": self.seqlens,
            "causal": case.causal,
            "window_size": case.window,
            "return_softmax_lse": True,
            **self.descales,
        }
        if case.pages > 0:
            given["page_table"] = self.table
        elif case.pages < 0:
            given["cache_batch_idx"] = self.table[:, 0].contiguous()
        if case.leftpad is not None:
            given["cache_leftpad"] = torch.tensor(case.leftpad).int().to(self.device)
        if case.num_new:
            given |= {"k": self.new_k, "v": self.new_v}
        if case.rotary:
            given |= {"rotary_cos": self.cos, "rotary_sin": self.sin}
            given["rotary_interleaved"] = case.rotary == "interleaved"
        if case.is_packed:
            ends = torch.tensor([0, *case.num_queries]).cumsum(0).int().to(self.device)
            given |= {"cu_seqlens_q": ends, "max_seqlen_q": max(case.num_queries)}
        return given

    def queries(self) -> Tensor:
        return (torch.cat if self.case.is_packed else torch.stack)(self.q)

    def parts(self, out: Tensor, lse: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each sequence (1, n, h_q, dv) and (1, h_q, n)."""
        if not self.case.is_packed:
            return list(zip(out.split(1), lse.split(1), strict=True))
        counts = list(self.case.num_queries)
        pairs = zip(out.split(counts), lse.split(counts, dim=1), strict=True)
        return [(o[None], x[None]) for o, x in pairs]

    def expected(self):
        """q, k and v of each sequence as attention is to see them, (1, n, h, d)."""
        for i, (q, k, v) in enumerate(self.stored()):
            yield q, self._values(k, "k_descale", i), self._values(v, "v_descale", i)

    def stored(self):
        """The same, but k and v as they are in the cache."""
        case = self.case
        for i, n in enumerate(case.lengths):
            q, new = self.q[i], self.new_k[i]
            if case.rotary:
                step = case.causal or max(case.window) >= 0
                q = self._rotated(q, n + step * torch.arange(len(q)))
                new = self._rotated(new, n + torch.arange(len(new)))
            new_v, start = self.new_v[i], self.starts[i]
            if self.descales:
                new, new_v = self._codes(new, "k_descale", i), self._codes(new_v, "v_descale", i)
            k, v = (
                torch.cat([bits(x[start:]), bits(y)]).view(x.dtype)
                for x, y in ((self.k[i], new), (self.v[i], new_v))
            )
            yield q[None], k[None], v[None]

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        return rotated(x, self.cos[position], self.sin[position], self.case.rotary)

    def exact_and_baseline(self, q, k, v):
        """out and lse in fp32, out at the precision of the inputs."""
        if k.shape[1] == 0:
            out = q.new_zeros(*q.shape[:3], v.shape[3])
            return out, torch.full((1, q.shape[2], q.shape[1]), -torch.inf).to(q.device), out
        exact, lse = reference.exact(q, k, v, **self.case.mask)
        return exact, lse, reference.baseline(q, k.to(q), v.to(q), **self.case.mask)


def bits(x: Tensor) -> Tensor:
    """The same as integers, which torch moves whatever the dtype is."""
    return x.view(Bordered.BITS[x.element_size()])


# dtype, head dims, mask, and sizes of pages that share a kernel with it.
KERNELS = (
    ("bf16", (64, 64), (True, (-1, -1)), (16, 48)),
    ("fp16", (128, 120), (False, (-1, -1)), (256, -1, 384)),
    ("bf16", (192, 128), (True, (-1, -1)), (64, 192)),
    ("bf16", (256, 248), (False, (90, 0)), (8, 24)),
    ("fp16", (88, 96), (False, (-1, -1)), (0,)),
)
# The same of pages whose rows are gathered: rows of 128 bytes, of 192 and of 512, and blocks whose
# rows the warps share evenly and not.
GATHERED = (
    ("bf16", (64, 64), (True, (-1, -1)), (5, 1)),
    ("fp16", (88, 96), (False, (-1, -1)), (12, 1)),
    ("bf16", (256, 248), (False, (90, 0)), (1, 20)),
)
FACTORS = {
    "kernel": KERNELS,
    "pages": (0, 1, 2),
    "lengths": ((200, 37), (0, 129, 64), (333,), (1, 16, 300)),
    "queries": ("one", "four", "packed"),
    "new": (0, 1, 5),
    "rotary": (None, "halves", "interleaved"),
    "heads": ((2, 2), (4, 2), (6, 1)),
}


def covering(kernels=KERNELS, seed: int = 1) -> list[CacheCase]:
    """Any two values of two factors meet, in the order of their kernels."""
    cases = []
    for row in pairwise(FACTORS | {"kernel": kernels}, seed):
        dtype, (d, dv), (causal, window), sizes = row["kernel"]
        lengths = row["lengths"]
        b = len(lengths)
        longest = 70 if d == 64 else 10  # which makes another kernel: tiles for many queries
        packed = (1, longest, 0)[:b]
        counts = {"one": (1,) * b, "four": (4,) * b, "packed": packed}[row["queries"]]
        cases.append(
            CacheCase(
                *(lengths, counts, row["new"], sizes[row["pages"] % len(sizes)], row["rotary"]),
                *(dtype, d, dv, *row["heads"], causal, window),
            )
        )
    return sorted(cases, key=lambda c: (c.head_dim, repr(c)))
