"""The work that the emulator counts in the kernels is that which their tiles amount to."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import fa3
from fa3.call.scales import num_blocks, packed_blocks
from fa3.kernels.bwd_arguments import PARTS
from fa3.kernels.bwd_config import DELTA_DEPTH
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import Quantised, Signature, head_dim_tile
from fa3.launch import tuning

from .cache_cases import CacheCase, Call
from .conftest import HOPPER
from .ragged_cases import Rows

pytestmark = pytest.mark.skipif(HOPPER, reason="a GPU counts differently, with its own tools")

DTYPES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "fp32": torch.float32}
ONES = 8  # rows of transposed V that sum P, with one-byte inputs


@dataclass(frozen=True)
class Work:
    """A call, and what its tiles multiply, exponentiate and move."""

    dtype: str
    head_dim: int
    causal: bool
    s_q: int | tuple[int, ...]  # several: of ragged sequences
    s_k: int | tuple[int, ...]
    head_dim_v: int = 0  # 0: head_dim
    heads: int = 1
    quantised: Quantised | None = None
    rows: tuple[str, str] = ("packed", "packed")  # how ragged sequences lie: Rows.kind of q, of k

    def __str__(self):
        lengths = "-ragged" if self.is_ragged else f"-{self.s_q}"
        return f"{self.dtype}-d{self.head_dim}-{self.mask}{lengths}"

    @property
    def dv(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def signature(self) -> Signature:
        dims = head_dim_tile(self.head_dim), head_dim_tile(self.dv)
        return Signature(self.dtype, *dims, self.mask, self.quantised)

    @property
    def config(self):
        return tuning.forward(self.signature)

    @property
    def is_dynamic(self) -> bool:
        return self.config.is_dynamic(replace(self.signature, is_ragged=self.is_ragged))

    @property
    def is_ragged(self) -> bool:
        return isinstance(self.s_q, tuple)

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Queries and keys of each."""
        if self.is_ragged:
            return list(zip(self.s_q, self.s_k, strict=True))
        return [(self.s_q, self.s_k)]

    @property
    def tiles(self) -> list[tuple[int, int, int]]:
        """Query rows and keys of each tile, as far as they exist, and its key blocks."""
        found = []
        for s_q, s_k in self.sequences:
            for first in range(0, s_q, self.config.tile_m):
                last = min(first + self.config.tile_m, s_q)
                keys = min(s_k, last + s_k - s_q) if self.causal else s_k
                blocks = max(1, -(-keys // self.config.tile_n))  # one where no key is seen
                found.append((last - first, min(s_k, blocks * self.config.tile_n), blocks))
        return found * self.heads

    @property
    def blocks(self) -> int:
        """Key blocks of all tiles."""
        return sum(blocks for _, _, blocks in self.tiles)

    @property
    def stored_rows(self) -> int:
        """Of out and lse."""
        return sum(s_q for s_q, _ in self.sequences) * self.heads

    @property
    def flops(self) -> int:
        s, c = self.signature, self.config
        ones = ONES if self.quantised and not c.o_slice else 0
        return 2 * c.tile_m * c.tile_n * (s.head_dim + s.head_dim_v + ones) * self.blocks

    @property
    def exponentials(self) -> int:
        return self.config.tile_m * self.config.tile_n * self.blocks

    @property
    def loaded(self) -> int:
        """Bytes that arrive in shared memory: whole tiles of Q, K and V."""
        s, c = self.signature, self.config
        elements = c.tile_m * s.head_dim * len(self.tiles)
        elements += c.tile_n * (s.head_dim + s.head_dim_v) * self.blocks
        return elements * DTYPES[self.dtype].itemsize

    @property
    def read(self) -> int:
        """Bytes of those that the tensors have."""
        elements = sum(
            rows * self.head_dim + keys * (self.head_dim + self.dv) for rows, keys, _ in self.tiles
        )
        return elements * DTYPES[self.dtype].itemsize

    def run(self) -> None:
        """Where a maximum moves, that takes exponentials of its own, in a warp.

        Here none does: scores are small, and rows of one warp see their first key in one block.
        """
        q_shape, k_shape = self._shapes()
        sizes = (q_shape, self.head_dim), (k_shape, self.head_dim), (k_shape, self.dv)
        q, k, v = (
            (0.1 * torch.randn(*shape, self.heads, width)).to(DTYPES[self.dtype])
            for shape, width in sizes
        )
        options = {"causal": self.causal} | self._descales(*k_shape)
        if self.quantised and self.quantised.out == "fp32":
            options["out"] = torch.empty(*q_shape, self.heads, self.dv)
        if not self.is_ragged:
            fa3.flash_attn_func(q, k, v, **options)
            return
        queries, keys = self._sides()
        lengths = queries.arguments("q", "cpu") | keys.arguments("k", "cpu")
        if "out" in options:
            options["out"] = queries.given(options["out"])
        fa3.flash_attn_varlen_func(
            queries.given(q), keys.given(k), keys.given(v), **lengths, **options
        )

    def _sides(self) -> tuple[Rows, Rows]:
        """Ragged queries and keys."""
        return Rows(self.rows[0], self.s_q), Rows(self.rows[1], self.s_k)

    def _shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Entries of the batch and rows, of q and of k."""
        if self.is_ragged:
            return tuple(side.shape for side in self._sides())
        return (1, self.s_q), (1, self.s_k)

    def _descales(self, entries: int, rows: int) -> dict:
        if self.quantised is None:
            return {}
        is_packed = self.is_ragged and self.rows[1] != "dense"
        count = partial(packed_blocks, batch=len(self.sequences)) if is_packed else num_blocks
        blocks = {"k": self.quantised.k_block, "v": self.quantised.v_block}
        return {
            f"{name}_descale": torch.ones(entries, self.heads, count(rows, block))
            for name, block in blocks.items()
            if block
        }


# Kernels that tests of accuracy run, too.
BLOCKS_OF_K = Quantised("e4m3", "e4m3", "bf16", k_block=64)
WORK = [
    Work("bf16", 128, False, 300, 400),
    Work("bf16", 64, True, 257, 305),
    Work("bf16", 64, True, 193, 193, heads=2),
    Work("bf16", 40, False, 70, 140, head_dim_v=8),
    Work("e4m3", 64, True, 200, 328, quantised=Quantised("e4m3", "e4m3", "fp32", 64, 128)),
    Work("e4m3", 192, True, 152, 200, quantised=BLOCKS_OF_K),
]
# Among them: without keys, without queries, without both, more queries than keys, and rows of
# tensors that belong to no sequence.
RAGGED = [
    Work("bf16", 128, False, (130, 70, 0, 0, 257), (400, 0, 33, 0, 176)),
    Work("bf16", 64, True, (193, 64, 0, 500, 1), (305, 0, 40, 100, 17), heads=2),
    Work("bf16", 40, True, (70, 5, 200), (150, 5, 8), 8, rows=("dense", "slack")),
    Work(
        *("e4m3", 64, False, (200, 70, 0, 1), (333, 0, 64, 129)),
        quantised=Quantised("e4m3", "e4m3", "bf16", 64, 128),
    ),
    Work(
        *("e4m3", 192, True, (152, 300, 3), (200, 76, 0)),
        quantised=BLOCKS_OF_K,
        rows=("slack", "dense"),
    ),
]


@pytest.mark.parametrize("work", WORK + RAGGED, ids=str)
def test_counted_work_is_that_of_the_tiles(work, device):
    from fa3 import emulator

    with emulator.options(checks=()), emulator.profile() as profile:
        work.run()
    *lists, launch = profile.launches
    assert len(lists) == work.is_ragged, "of tiles"
    counters, total = launch.counters, launch.total
    assert launch.warps[0].role == "load" and counters["load"].warps == 1
    assert counters["mma"].warps == 4 * work.config.num_mma_warpgroups
    assert counters["mma"].flops == total.flops == work.flops
    assert counters["mma"].exponentials == work.exponentials
    assert counters["load"].bytes.bulk_loaded == total.bytes.bulk_loaded == work.loaded
    assert counters["load"].bytes.bulk_read == work.read
    waits = len(work.tiles) + 2 * work.blocks  # for Q of each tile, K and V of each block
    assert counters["load"].waits["mbarrier"].executed == waits
    told = len(work.tiles) + launch.grid[0] if work.is_dynamic else 0  # each CTA of its end, too
    assert counters["mma"].waits["mbarrier"].executed == (waits + told) * counters["mma"].warps
    rows = work.stored_rows
    if work.quantised:
        assert total.bytes.bulk_written == 0
        assert total.bytes.stored == rows * (4 + DTYPES[work.quantised.out].itemsize * work.dv)
    else:
        assert total.bytes.bulk_written == rows * work.dv * 2
        assert total.bytes.stored == 4 * rows  # the lse


@dataclass(frozen=True)
class WorkBack:
    """A backward pass of one batch, and what its tiles multiply, exponentiate and move."""

    dtype: str
    head_dim: int
    causal: bool
    s_q: int
    s_k: int
    head_dim_v: int = 0  # 0: head_dim
    group: int = 1  # query heads, to one key head

    def __str__(self):
        return f"{self.dtype}-d{self.head_dim}-{'causal' if self.causal else 'full'}-{self.s_q}"

    @property
    def dv(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def tile_dims(self) -> tuple[int, int]:
        return tuning.backward_tiles(head_dim_tile(self.head_dim), head_dim_tile(self.dv))

    @property
    def config(self):
        mask = "causal" if self.causal else "full"
        return tuning.backward(BwdSignature(self.dtype, *self.tile_dims, mask))

    @property
    def tiles(self) -> list[tuple[int, list[int]]]:
        """Keys of each tile, as far as they exist, and the queries of the blocks that it visits."""
        found, c = [], self.config
        for first in range(0, self.s_k, c.tile_n):
            seen_from = max(0, first - (self.s_k - self.s_q)) if self.causal else 0
            starts = range(seen_from // c.tile_m * c.tile_m, self.s_q, c.tile_m)
            rows = [min(c.tile_m, self.s_q - start) for start in starts]
            found.append((min(c.tile_n, self.s_k - first), rows * self.group))
        return found

    @property
    def blocks(self) -> int:
        """Visited, by all tiles."""
        return sum(len(rows) for _, rows in self.tiles)

    @property
    def flops(self) -> int:
        """With the parts of delta, and dQ of no block ahead of each head's first one."""
        (d, dv), c = self.tile_dims, self.config
        delta = DELTA_DEPTH if c.delta_in_parts else 0
        heads = self.group * sum(rows != [] for _, rows in self.tiles) if c.splits_keys else 0
        depth = (3 * d + 2 * dv + delta) * self.blocks + d * heads
        return 2 * c.tile_m * c.tile_n * depth

    @property
    def exponentials(self) -> int:
        return self.config.tile_m * self.config.tile_n * self.blocks

    @property
    def loaded(self) -> int:
        """Bytes that arrive in shared memory: K and V; Q and dO with numbers per row."""
        c, width = self.config, 2 * sum(self.tile_dims)
        return c.tile_n * width * len(self.tiles) + c.tile_m * (width + self.numbers) * self.blocks

    @property
    def numbers(self) -> int:
        """Bytes of lse and delta, or of delta's parts, of a row."""
        return 4 + (2 * PARTS if self.config.delta_in_parts else 4)

    @property
    def read(self) -> int:
        """Bytes of those that the tensors have."""
        width = 2 * (self.head_dim + self.dv)
        rows = sum(keys + sum(queries) for keys, queries in self.tiles)
        return width * rows + self.numbers * self.config.tile_m * self.blocks

    @property
    def summed(self) -> int:
        """Bytes of dQ that the tiles add, of whole blocks."""
        return 4 * self.config.tile_m * self.tile_dims[0] * self.blocks

    @property
    def query_blocks(self) -> int:
        return -(-self.s_q // self.config.tile_m) * self.group

    def run(self):
        """(profile, its launches in order: prepare, backward, finish)."""
        from fa3 import emulator

        torch.manual_seed(0)
        shapes = (
            *((self.s_q, self.group, self.head_dim), (self.s_k, 1, self.head_dim)),
            *((self.s_k, 1, self.dv), (self.s_q, self.group, self.dv)),
        )
        q, k, v, dout = (torch.randn(1, *shape).to(DTYPES[self.dtype]) for shape in shapes)
        out, lse = torch.zeros_like(dout), torch.zeros(1, self.group, self.s_q)
        with emulator.options(checks=()), emulator.profile() as profile:
            torch.ops.fa3.backward(dout, q, k, v, out, lse, causal=self.causal)
        return profile.launches


BACK = [
    WorkBack("bf16", 64, False, 200, 300, group=2),
    WorkBack("bf16", 40, True, 150, 257, head_dim_v=8),
    WorkBack("bf16", 128, False, 130, 257),
    WorkBack("bf16", 192, True, 200, 150, head_dim_v=128),
    WorkBack("bf16", 256, False, 130, 70),
]


@pytest.mark.parametrize("work", BACK, ids=str)
def test_counted_work_of_a_backward_pass_is_that_of_the_tiles(work, device):
    prepare, launch, finish = work.run()
    counters, total = launch.counters, launch.total
    assert counters["mma"].warps == 4 * work.config.num_mma_warpgroups
    assert counters["mma"].flops == total.flops == work.flops
    assert counters["mma"].exponentials == total.exponentials == work.exponentials
    assert counters["load"].bytes.bulk_loaded == total.bytes.bulk_loaded == work.loaded
    assert counters["load"].bytes.bulk_read == work.read
    assert counters["mma"].bytes.summed == total.bytes.summed == work.summed
    gradients = 2 * work.config.tile_n * sum(work.tile_dims) * len(work.tiles)
    in_bulk = work.summed if work.config.dq_in_bulk else 0
    assert counters["mma"].bytes.bulk_stored == total.bytes.bulk_stored == in_bulk + gradients
    assert total.bytes.bulk_written == 2 * work.s_k * (work.head_dim + work.dv)
    assert total.bytes.stored == 0
    # For K and Q, and V and dO: the producer for those that are released apart, a consumer that has
    # some of the products for those that its own first product needs.
    once, apart = len(work.tiles) + work.blocks, work.config.splits_products
    assert counters["load"].waits["mbarrier"].executed == once * (2 if apart else 1)
    waits = once * (1 if apart else 2) * counters["mma"].warps
    assert counters["mma"].waits["mbarrier"].executed == waits
    rows = work.query_blocks * work.config.tile_m
    sums = 4 * rows * work.tile_dims[0]
    parts = 2 * PARTS * rows if work.config.delta_in_parts else 0
    assert prepare.total.bytes.stored == 8 * rows + parts + sums
    assert finish.total.bytes.loaded == sums
    assert finish.total.bytes.bulk_written == 2 * work.s_q * work.group * work.head_dim
    kinds = [*launch.total.shared.values(), *finish.total.shared.values()]
    assert sum(x.conflicts for x in kinds) == 0


# Cycles of shared memory per cycle of the tensor cores in a step, as docs/algorithm.md has them.
SHARED = {64: 1.138, 96: 1.166, 128: 1.199, 192: 1.340, 256: 1.481}


@pytest.mark.parametrize("head_dim", SHARED)
def test_shared_memory_of_a_step_back(head_dim, device):
    from fa3.emulator.profiling.clock import MMA_FLOPS

    cycles, flops = [], []
    for s_q in (128, 256):
        work = WorkBack("bf16", head_dim, False, s_q, 64)
        _, launch, _ = work.run()
        cycles.append(launch.total.shared_cycles)
        flops.append(work.flops)
    products = (flops[1] - flops[0]) / MMA_FLOPS[2]
    assert (cycles[1] - cycles[0]) / products == pytest.approx(SHARED[head_dim], abs=0.001)


def test_a_profile_changes_no_result(device):
    from fa3 import emulator

    q, k, v = (torch.randn(1, n, 2, 64, dtype=torch.bfloat16) for n in (150, 200, 200))

    def run():
        return fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    plain = run()
    with emulator.profile():
        profiled = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, profiled, strict=True))


# a tile of queries, and how much longer than its products a key block may take in nominal time: a
# kernel whose loads, turns or waits are in another order takes longer.  FP8 has more exponentials
# per product than the MUFU can hide.
STEPS = [
    (Work("bf16", 64, False, 192, 0), 1.01),
    (Work("bf16", 128, False, 128, 0), 1.01),
    (Work("bf16", 256, False, 128, 0), 1.01),
    (Work("e4m3", 128, False, 128, 0, quantised=Quantised("e4m3", "e4m3", "bf16", 128, 128)), 1.15),
]


@pytest.mark.parametrize("tile, limit", STEPS, ids=lambda x: str(getattr(x, "head_dim", x)))
def test_a_step_takes_hardly_longer_than_its_products(tile, limit, device):
    from fa3 import emulator
    from fa3.emulator.profiling.clock import MMA_FLOPS

    cycles, flops = [], []
    for blocks in (6, 12):
        work = replace(tile, s_k=blocks * tile.config.tile_n)
        with emulator.options(checks=()), emulator.profile() as profile:
            work.run()
        cycles.append(profile.launches[0].cycles)
        flops.append(work.flops)
    products = (flops[1] - flops[0]) / MMA_FLOPS[DTYPES[tile.dtype].itemsize]
    assert 0.999 * products < cycles[1] - cycles[0] <= limit * products


def test_shared_memory_has_no_bank_conflicts(device):
    """Neither the stores of O nor the transpose of V."""
    from fa3 import emulator

    with emulator.options(checks=()), emulator.profile() as profile:
        WORK[0].run()
        replace(STEPS[3][0], s_k=300).run()
    kinds = [{kind: x.conflicts for kind, x in p.total.shared.items()} for p in profile.launches]
    assert kinds == [{"stmatrix": 0}, {"st": 0, "ldmatrix": 0, "stmatrix": 0}]


STEP = CacheCase(num_queries=(1, 1), num_new=1, h_q=6, lengths=(500, 37))
SERVED = [
    (STEP, 1),
    (STEP, 3),
    (CacheCase(num_new=2, rotary="halves", cache="e4m3"), 1),
    (
        CacheCase(
            **{"num_queries": (1, 70), "num_new": 5, "pages": 0, "causal": False, "cache": "e4m3"},
            **{"dtype": "fp16", "head_dim": 128, "head_dim_v": 112, "lengths": (300, 50)},
        ),
        1,
    ),
]


@pytest.mark.parametrize(("case", "num_splits"), SERVED, ids=str)
def test_a_step_reads_every_key_once_for_all_heads_of_its_group(case, num_splits, device):
    """And q once per split. What widens the bytes of keys meets no bank of shared memory twice."""
    from fa3 import emulator

    call = Call(case, device)
    q, given = call.queries(), call.arguments() | {"num_splits": num_splits}
    with emulator.options(checks=()), emulator.profile() as profile:
        fa3.flash_attn_with_kvcache(q, **given, pack_gqa=max(case.num_queries) < 5)
    (launch,) = (x for x in profile.launches if x.total.flops)
    width = 1 if case.cache else 2
    keys = sum(n + case.num_new for n in case.lengths)
    of_cache = keys * case.h_k * (case.head_dim + case.head_dim_v) * width
    of_q = 2 * sum(case.num_queries) * case.h_q * case.head_dim * num_splits
    apart = case.h_q // case.h_k if max(case.num_queries) > 5 else 1
    assert launch.total.bytes.bulk_read == of_cache * apart + of_q
    assert launch.counters["other"].conflicts == 0
