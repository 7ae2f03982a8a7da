"""Sequences of different lengths: packed, in pages of a cache, their keys split."""

import numpy as np
import torch
from torch import Tensor

from .backward import Backward
from .exact import Lengths
from .forward import Forward, NamedByCases, descales_of
from .small import Small

BATCH = 3


class Ragged(NamedByCases, Forward):
    """A row of passes.PASSES: fa3.flash_attn_varlen_func of packed tensors.

    Outputs are unpacked, with zeros in the rows of nobody.
    """

    name = "ragged"
    tests = ("tests/test_ragged.py", "tests/test_ragged_fp8.py", "tests/test_varlen_interface.py")
    smalls = (
        Small("bf16", 64, 64, 150, 200, True, batch=BATCH, seed=1),
        Small("fp16", 128, 128, 130, 300, batch=BATCH, seed=2),
        Small("bf16", 128, 128, 200, 260, False, (50, 9), batch=BATCH, h_k=2, seed=3),
        Small("bf16", 192, 128, 90, 150, True, batch=BATCH, seed=4),
        Small("bf16", 256, 256, 100, 140, batch=BATCH, seed=5),
        Small("e4m3", 128, 128, 150, 280, True, batch=BATCH, seed=6, scales="head"),
    )
    sanitized = (smalls[0], smalls[5])
    repeated = (Small("bf16", 128, 128, 2048, 2048, True, batch=8, h_q=16, h_k=4, seed=7),)
    first_calls = (Small("bf16", 128, 128, 128, 128, causal=True, batch=BATCH),)

    def lengths(self, case: Small) -> Lengths:
        """The first sequence has all rows, the last one no query."""
        draw = np.random.RandomState(case.seed)
        drawn = [(draw.randint(case.s_q), draw.randint(case.s_k)) for _ in range(case.batch - 2)]
        return [(case.s_q, case.s_k), *drawn, (0, case.s_k // 2)]

    def call(self, case: Small, inputs) -> dict[str, Tensor]:
        import fa3

        n_q, n_k = zip(*self.lengths(case), strict=True)
        packed = [_packed(x, n) for x, n in zip(inputs[:3], (n_q, n_k, n_k), strict=True)]
        lengths = *(_cumulated(n, packed[0].device) for n in (n_q, n_k)), case.s_q, case.s_k
        options = {"causal": case.causal, "window_size": case.window, **descales_of(inputs)}
        function = fa3.flash_attn_varlen_func
        out, lse = function(*packed, *lengths, **options, return_attn_probs=True)
        lse = _unpacked(lse.mT, n_q, case.s_q).transpose(1, 2).contiguous()
        return {"out": _unpacked(out, n_q, case.s_q), "lse": lse}


class RaggedBackward(NamedByCases, Backward):
    """Gradients of the same, unpacked."""

    name = "ragged backward"
    tests = ("tests/test_backward_ragged.py",)
    smalls = (
        Small("bf16", 64, 64, 150, 200, True, batch=BATCH, seed=1),
        Small("bf16", 128, 128, 130, 200, batch=BATCH, seed=2),
        Small("bf16", 256, 256, 100, 140, False, (50, 9), batch=BATCH, seed=3),
    )
    sanitized = smalls[:1]
    repeated = (Small("bf16", 128, 128, 1024, 1024, True, batch=8, h_q=16, h_k=4, seed=4),)
    first_calls = ()
    lengths = Ragged.lengths

    def call(self, case: Small, inputs) -> dict[str, Tensor]:
        import fa3

        n_q, n_k = zip(*self.lengths(case), strict=True)
        numbers = n_q, n_k, n_k, n_q
        *qkv, dout = (_packed(x, n) for x, n in zip(inputs, numbers, strict=True))
        leaves = [x.requires_grad_() for x in qkv]
        lengths = *(_cumulated(n, dout.device) for n in (n_q, n_k)), case.s_q, case.s_k
        options = {"causal": case.causal, "window_size": case.window, "deterministic": True}
        out = fa3.flash_attn_varlen_func(*leaves, *lengths, **options)
        rows = (n_q, case.s_q), (n_k, case.s_k), (n_k, case.s_k)
        found = zip(torch.autograd.grad(out, leaves, dout), rows, strict=True)
        return dict(zip(("dq", "dk", "dv"), (_unpacked(x, *n) for x, n in found), strict=True))


class Paged(NamedByCases, Forward):
    """A row of passes.PASSES: fa3.flash_attn_with_kvcache, keys in pages out of order."""

    name = "paged"
    num_splits = 1
    tests = ("tests/test_kvcache.py",)
    smalls = (
        Small("bf16", 128, 128, 1, 700, True, batch=BATCH, h_q=8, h_k=1, seed=1),
        Small("bf16", 64, 64, 4, 500, True, batch=BATCH, h_q=4, h_k=2, seed=2),
        Small("fp16", 128, 128, 70, 400, True, batch=BATCH, h_q=4, h_k=4, seed=3),
        Small("bf16", 256, 256, 3, 300, False, batch=BATCH, h_q=4, h_k=1, seed=4),
        Small("e4m3", 128, 128, 2, 600, True, batch=BATCH, h_q=8, h_k=2, seed=5, scales="head"),
    )
    sanitized = (smalls[1], smalls[4])
    repeated = (Small("bf16", 128, 128, 4, 8192, True, batch=8, h_q=32, h_k=4, seed=6),)
    first_calls = smalls[:1]

    def lengths(self, case: Small) -> Lengths:
        draw = np.random.RandomState(case.seed)
        keys = [case.s_q + draw.randint(case.s_k - case.s_q) for _ in range(case.batch - 1)]
        return [(case.s_q, n) for n in (case.s_k, *keys)]

    def call(self, case: Small, inputs) -> dict[str, Tensor]:
        import fa3

        q, *caches = inputs[:3]
        size = (16, 64, 256)[case.seed % 3]
        pages = -(-case.s_k // size)
        order = np.random.RandomState(case.seed).permutation(case.batch * pages)
        table = torch.from_numpy(order.astype(np.int32)).view(case.batch, pages).to(q.device)
        used = [n for _, n in self.lengths(case)]
        out, lse = fa3.flash_attn_with_kvcache(
            q,
            *(_in_pages(x, size, order) for x in caches),
            cache_seqlens=torch.tensor(used, dtype=torch.int32, device=q.device),
            page_table=table,
            causal=case.causal,
            window_size=case.window,
            num_splits=self.num_splits,
            return_softmax_lse=True,
            **descales_of(inputs),
        )
        return {"out": out, "lse": lse}


class Split(Paged):
    """The same with the keys of a sequence in three parts, whose results are combined."""

    name = "split"
    num_splits = 3
    tests = ("tests/test_split.py",)


def _cumulated(numbers, device) -> Tensor:
    return torch.tensor(np.cumsum([0, *numbers]), dtype=torch.int32, device=device)


def _packed(x: Tensor, numbers) -> Tensor:
    return torch.cat([part[:n] for part, n in zip(x, numbers, strict=True)])


def _unpacked(x: Tensor, numbers, rows: int) -> Tensor:
    """(total, ...) -> (b, rows, ...), zeros below."""
    out = x.new_zeros(len(numbers), rows, *x.shape[1:])
    for place, part in zip(out, x.split(list(numbers)), strict=True):
        place[: len(part)] = part
    return out


def _in_pages(x: Tensor, size: int, order) -> Tensor:
    """(b, s, h, d) -> (pages, size, h, d), page i of all at order[i]."""
    batch, rows, *rest = x.shape
    pages = -(-rows // size)
    bits = x.view(torch.uint8) if x.itemsize == 1 else x
    padded = bits.new_zeros(batch, pages * size, *rest)
    padded[:, :rows] = bits
    found = torch.empty_like(padded).view(batch * pages, size, *rest)
    found[torch.from_numpy(order).to(x.device)] = padded.view(batch * pages, size, *rest)
    return found.view(x.dtype)
