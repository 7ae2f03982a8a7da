"""How long a step of generation takes, beside other kernels, and its share of a copy's rate.

    python -m perf.serving                            decode and verify: every case
    python -m perf.serving --kinds decode --dtypes e4m3 --batches 8 --keys 8192 --pages 64

A step attends from 1 query of each sequence (decode), or from 4 (verify), to a cache in pages; all
sequences have as many keys, 8 key heads, head dim 128. e4m3 is the cache's dtype, with a scale per
head; q and the result are bf16 then. Bytes are those that must move: the keys and values of all
sequences, q and the result. The list of tiles is made ahead, as for all layers of a step. Results
are compared with fp32 first; then all backends and a large copy are timed in interleaved rounds,
each call with a cold L2. Writes a CSV file. Needs a CUDA GPU; without one it says so and does
nothing else.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import timing
from .backends import Absent
from .backends.common import first, module
from .cases import DTYPES
from .check import ROW_ERROR, row_error
from .results import ROOT, write_csv

STEM = "serving"  # beginning of the names of its CSV files
QUERIES = {"decode": 1, "verify": 4}
BATCHES, KEYS = (1, 8, 64), (1024, 8192, 32_768, 131_072)
GROUPS, PAGES = (1, 8), (16, 64, 256)
HEADS_KV, HEAD_DIM = 8, 128
CHECKED = 2  # sequences that are compared with fp32
COPIED = 512 << 20  # bytes that the copy reads


@dataclass(frozen=True)
class Step:
    """One backend on one case; where it has no time, `note` says why."""

    kind: str  # one of QUERIES
    dtype: str  # of the cache
    batch: int
    keys: int  # of each sequence
    group: int  # heads of q that share one of k
    page_size: int
    backend: str = ""
    us: float | None = None  # median
    us_low: float | None = None  # quartiles
    us_high: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None  # of a copy among the same rounds
    percent_of_copy: float | None = None
    row_error: float | None = None
    note: str = ""

    def __str__(self) -> str:
        names = self.kind, self.dtype, f"batch {self.batch}", f"{self.keys} keys"
        return ", ".join([*names, f"group {self.group}", f"pages of {self.page_size}"])

    @property
    def queries(self) -> int:
        return QUERIES[self.kind]

    @property
    def heads(self) -> int:
        return HEADS_KV * self.group

    @property
    def bytes(self) -> int:
        """Of the cache, each key once for all heads of its group, and of q and the result."""
        of_cache = 2 * self.batch * self.keys * HEADS_KV * HEAD_DIM * DTYPES[self.dtype].itemsize
        return of_cache + 2 * 2 * self.batch * self.queries * self.heads * HEAD_DIM


@dataclass(frozen=True)
class Cache:
    """The tensors of a step."""

    q: Tensor  # (batch, queries, h_q, d)
    k: Tensor  # (pages, page_size, h_k, d)
    v: Tensor
    table: Tensor  # (batch, pages) int32
    lengths: Tensor  # (batch,) int32
    descales: tuple[Tensor, Tensor] | None  # (batch, h_k) of k and v, of one-byte caches

    @classmethod
    def of(cls, step: Step, device) -> "Cache":
        dtype, per_sequence = DTYPES[step.dtype], -(-step.keys // step.page_size)
        q_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
        shape = step.batch, step.queries, step.heads, HEAD_DIM
        count = step.batch * per_sequence
        pages = count, step.page_size, HEADS_KV, HEAD_DIM
        k, v = (torch.randn(pages, device=device, dtype=q_dtype).to(dtype) for _ in range(2))
        table = torch.randperm(count, device=device).int().view(step.batch, per_sequence)
        lengths = torch.full((step.batch,), step.keys, dtype=torch.int32, device=device)
        descales = None
        if dtype.itemsize == 1:
            ones = torch.ones(step.batch, HEADS_KV, device=device)
            descales = ones, ones
        return cls(torch.randn(shape, device=device).to(q_dtype), k, v, table, lengths, descales)

    def rows(self, keys: int, count: int) -> tuple[Tensor, Tensor]:
        """k and v of the first sequences, (count, keys, h_k, d)."""
        return tuple(
            x.view(torch.uint8 if x.itemsize == 1 else x.dtype)[self.table[:count].long()]
            .flatten(1, 2)[:, :keys]
            .view(x.dtype)
            for x in (self.k, self.v)
        )


Prepare = Callable[[Step, Cache], Callable[[], Tensor]]


def fa3(step: Step, cache: Cache) -> Callable[[], Tensor]:
    """This project."""
    project = module("fa3")
    dtypes = {"qkv_dtype": cache.q.dtype, "kv_dtype": cache.k.dtype}
    sizes = step.batch, step.queries, step.keys, step.heads, HEADS_KV, HEAD_DIM
    metadata = project.get_scheduler_metadata(
        *sizes, cache.lengths, page_size=step.page_size, causal=True, **dtypes
    )
    given = {"cache_seqlens": cache.lengths, "page_table": cache.table, "causal": True}
    given |= {"scheduler_metadata": metadata} | _descales(cache)
    return lambda: project.flash_attn_with_kvcache(cache.q, cache.k, cache.v, **given)


def fa3_cpp(step: Step, cache: Cache) -> Callable[[], Tensor]:
    """The C++ FlashAttention-3, to which q comes in e4m3 beside such a cache."""
    interface = module("flash_attn_interface")
    q, given = cache.q, {"cache_seqlens": cache.lengths, "page_table": cache.table, "causal": True}
    if cache.descales:
        q = q.to(cache.k.dtype)
        given |= _descales(cache) | {"q_descale": cache.descales[0]}
    return lambda: first(interface.flash_attn_with_kvcache(q, cache.k, cache.v, **given))


def sdpa(step: Step, cache: Cache) -> Callable[[], Tensor]:
    """torch's, which knows no pages: the keys are gathered ahead, and that is not timed."""
    if cache.descales:
        raise Absent("scaled_dot_product_attention takes no FP8")
    if step.queries > 1:
        raise Absent("scaled_dot_product_attention aligns causal masks to the top left")
    q, k, v = (x.transpose(1, 2) for x in (cache.q, *cache.rows(step.keys, step.batch)))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


BACKENDS: dict[str, Prepare] = {"fa3": fa3, "fa3-cpp": fa3_cpp, "sdpa": sdpa}


def _descales(cache: Cache) -> dict:
    return dict(zip(("k_descale", "v_descale"), cache.descales or (), strict=False))


def cases(kinds, dtypes, batches, keys, groups, pages) -> list[Step]:  # noqa: PLR0913
    return [Step(*facts) for facts in product(kinds, dtypes, batches, keys, groups, pages)]


def exact(step: Step, cache: Cache) -> Tensor:
    """Of the first sequences in fp32, (count, queries, h_q, d)."""
    count = min(CHECKED, step.batch)
    k, v = (x.float().transpose(1, 2) for x in cache.rows(step.keys, count))  # (b, h_k, s_k, d)
    q = cache.q[:count].float().transpose(1, 2).unflatten(1, (HEADS_KV, step.group))
    scores = (q @ k[:, :, None].mT) * HEAD_DIM**-0.5  # (b, h_k, group, s_q, s_k)
    query = torch.arange(step.queries, device=q.device)[:, None] + step.keys - step.queries
    hidden = torch.arange(step.keys, device=q.device) > query
    p = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
    return (p @ v[:, :, None]).flatten(1, 2).transpose(1, 2)


def measure(
    step: Step,
    backends: dict[str, Prepare],
    rounds: int,
    sample: timing.Sample,
    device: torch.device | str = "cuda",
    copied: int = COPIED,
) -> list[Step]:
    """Check, then time every backend on one case."""
    torch.manual_seed(0)
    cache = Cache.of(step, device)
    expected = exact(step, cache)
    q_dtype = "fp16" if cache.q.dtype == torch.float16 else "bf16"
    rounded = {"fa3-cpp": step.dtype}  # which rounds q to the dtype of the cache
    calls, errors, notes = {}, {}, {}
    for name, prepare in backends.items():
        try:
            call = prepare(step, cache)
            errors[name] = row_error(call()[: len(expected)], expected)
            if errors[name] > ROW_ERROR[rounded.get(name, q_dtype)]:
                raise ValueError(f"wrong output: a row is off by {errors[name]:.2g} of its length")
            calls[name] = call
        except Exception as error:  # one backend's failure is a line of the report
            text = " ".join(str(error).split())
            kind = "" if isinstance(error, Absent) else f"{type(error).__name__}: "
            notes[name] = f"{kind}{text}"[:200]
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = timing.interleave({**calls, "copy": lambda: target.copy_(source)}, rounds, sample)
    copy = 2 * copied / statistics.median(times["copy"]) / 1e6
    rows = []
    for name in backends:
        if name not in calls:
            rows.append(replace(step, backend=name, note=notes[name]))
            continue
        low, middle, high = (1e3 * x for x in statistics.quantiles(times[name], n=4))
        speed = step.bytes / middle / 1e3
        measured = {"us": middle, "us_low": low, "us_high": high, "row_error": errors[name]}
        share = {"gb_per_s": speed, "copy_gb_per_s": copy, "percent_of_copy": 100 * speed / copy}
        rows.append(replace(step, backend=name, **measured, **share))
    return rows


def main(argv: list[str] | None = None) -> int:
    from .progress import track
    from .sweep import WARM_UP_SECONDS, this_machine

    parser = argparse.ArgumentParser(
        "python -m perf.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kinds", nargs="+", choices=QUERIES, default=list(QUERIES))
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--batches", type=int, nargs="+", default=list(BATCHES), metavar="B")
    add("--keys", type=int, nargs="+", default=list(KEYS), metavar="N")
    add("--groups", type=int, nargs="+", default=list(GROUPS), metavar="G")
    add("--pages", type=int, nargs="+", default=list(PAGES), metavar="TOKENS")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    add("--rounds", type=int, default=5)
    add("--out", type=Path, default=ROOT / "perf" / "out")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("perf.serving: there is no CUDA GPU here, so nothing was measured or written.")
        return 0
    machine, sample = this_machine(), timing.GpuTimer()
    timing.warm_up(timing.matmul_call(torch.bfloat16)[0], WARM_UP_SECONDS)
    backends = {name: BACKENDS[name] for name in options.backends}
    grid = options.kinds, options.dtypes, options.batches, options.keys, options.groups
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{STEM}-{machine.date.replace(':', '')}.csv"
    rows = []
    for step in track(cases(*grid, options.pages), "case"):
        rows += measure(step, backends, options.rounds, sample)
        write_csv(path, rows, machine)
        print("\n".join(f"{step}: {line}" for line in map(told, rows[-len(backends) :])))
    print(f"written: {path}")
    return 0


def told(step: Step) -> str:
    if step.us is None:
        return f"{step.backend} {step.note}"
    return f"{step.backend} {step.us:.1f} us, {step.percent_of_copy:.0f} % of a copy's rate"


if __name__ == "__main__":
    sys.exit(main())
