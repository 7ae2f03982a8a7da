"""The forward kernel computes the same bits whatever the order of its warps and copies."""

import math
import re
from dataclasses import dataclass

import pytest
import torch

from fa3.kernels.config import FwdConfig
from fa3.kernels.signature import UNBOUNDED, Quantised, Signature
from fa3.launch import jit

from . import reference
from .accuracy import assert_accurate, assert_lse
from .cases import kernel_arguments
from .conftest import HOPPER
from .fp8_calls import E4M3, INT8, numbers, values
from .fp8_reference import Attention

KERNEL = "fa3.kernels.sm90.forward.operands_16bit:forward"
FP8_KERNEL = "fa3.kernels.sm90.forward.operands_fp8:forward"
SEEDS, FP8_SEEDS = range(7), range(3)

pytestmark = pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")


@dataclass(frozen=True)
class Run:
    space: str
    mask: str
    warpgroups: int
    head_dim: int = 64
    head_dim_v: int = 64
    tile_n: int = 64
    stages: int = 2
    s_q: int = 300
    s_k: int = 300
    heads: int = 2
    num_ctas: int = 1

    def __str__(self):
        return f"{self.space}-{self.mask}-{self.warpgroups}wg-{self.s_q}x{self.s_k}"

    @property
    def window(self) -> tuple[int, int]:
        return (50, 20) if self.mask == "local" else (UNBOUNDED, UNBOUNDED)


RUNS = [
    Run("own", "causal", 2),
    Run("own", "local", 3, stages=3),
    Run("own", "full", 3, s_k=60, heads=3),  # one key block per tile
    Run("own", "full", 2, s_k=150, num_ctas=2, heads=3),
    Run("k", "causal", 2, head_dim=128),
    Run("k", "local", 2, head_dim=128),
    Run("k", "full", 3, head_dim=128, tile_n=96, s_k=250),
    Run("k", "full", 2, head_dim=128, s_k=60, heads=3),
    Run("kv", "causal", 2),
    Run("kv", "local", 2, head_dim=128, head_dim_v=128),
    Run("kv", "full", 2, s_k=60, heads=3),
    Run("q", "causal", 3),
    Run("q", "local", 2),
    Run("q", "full", 2, head_dim=128, head_dim_v=128, s_q=200, s_k=150),
    Run("q", "full", 3, s_k=60, heads=3),
]


def inputs(run: Run) -> list[torch.Tensor]:
    return [
        torch.randn(1, length, run.heads, width).bfloat16()
        for length, width in (
            (run.s_q, run.head_dim),
            (run.s_k, run.head_dim),
            (run.s_k, run.head_dim_v),
        )
    ]


def function(run: Run, q, k, v, name=KERNEL):
    """A function without arguments that launches the kernel: () -> (out, lse)."""
    signature = Signature("bf16", run.head_dim, run.head_dim_v, run.mask)
    config = FwdConfig(run.tile_n, run.warpgroups, run.stages, o_space=run.space)
    kernel = jit.compile(name, signature, config, "emulator")
    scale = run.head_dim**-0.5 * math.log2(math.e)

    def attention():
        out = torch.full((1, run.s_q, run.heads, run.head_dim_v), math.nan, dtype=torch.bfloat16)
        lse = torch.full((1, run.heads, run.s_q), math.nan)
        left, right = run.window
        kernel(
            kernel_arguments(
                q=q,
                k=k,
                v=v,
                out=out,
                lse=lse,
                scale_log2=scale,
                window_left=left,
                window_right=right,
                num_ctas=run.num_ctas,
                tiles=torch.zeros(1, dtype=torch.int32) if run.mask != "full" else None,
            )
        )
        return out, lse

    return attention


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_forward_is_the_same_under_every_schedule(run, device):
    from fa3 import emulator

    q, k, v = inputs(run)
    attention = function(run, q, k, v)
    out, lse = emulator.compare_schedules(attention, SEEDS, checks=emulator.ALL_CHECKS)
    window = run.window if run.mask == "local" else (-1, -1)
    mask = {"causal": run.mask == "causal", "window": window}
    exact, exact_lse = reference.exact(q, k, v, **mask)
    assert_accurate("out", out, exact, reference.baseline(q, k, v, **mask))
    assert_lse("lse", lse, exact_lse)


@dataclass(frozen=True)
class Fp8Run:
    """With scales per 128 queries, per 64 keys of k and per tile_n keys of v."""

    config: FwdConfig
    dtype: str = "e4m3"
    head_dim: int = 64
    mask: str = "full"
    s_q: int = 300
    s_k: int = 300
    num_ctas: int = 1

    def __str__(self):
        sliced = "-sliced" if self.config.o_slice else ""
        return f"{self.dtype}-{self.head_dim}{sliced}-{self.mask}-{self.s_q}x{self.s_k}"

    @property
    def signature(self) -> Signature:
        quantised = Quantised(self.dtype, "e4m3", "fp32", 64, self.config.tile_n)
        return Signature(self.dtype, self.head_dim, self.head_dim, self.mask, quantised)


FP8_RUNS = [
    Fp8Run(FwdConfig(tile_n=64, num_stages=3)),
    Fp8Run(FwdConfig(tile_n=64, num_mma_warpgroups=3), s_q=200, s_k=60, num_ctas=2),
    Fp8Run(FwdConfig(tile_n=128), "int8", 128, "causal", 260, 260),
    Fp8Run(FwdConfig(tile_n=64, o_slice=64), "e4m3", 256, "full", 130, 190),
]


@pytest.mark.parametrize("run", FP8_RUNS, ids=str)
def test_one_byte_inputs_are_the_same_under_every_schedule(run, device):
    from fa3 import emulator

    kernel = jit.compile(FP8_KERNEL, run.signature, run.config, "emulator")
    heads, d, scale = 2, run.head_dim, run.head_dim**-0.5
    dtypes = (INT8, INT8, E4M3) if run.dtype == "int8" else (E4M3, E4M3, E4M3)
    lengths = run.s_q, run.s_k, run.s_k
    inputs = [
        numbers(1, length, heads, d, dtype=dtype)
        for length, dtype in zip(lengths, dtypes, strict=True)
    ]
    blocks = 128, 64, run.config.tile_n
    unit = 1 / 32 if run.dtype == "int8" else 1.0
    descales = [
        (torch.rand(1, heads, -(-length // block)) + 0.5) * around
        for length, block, around in zip(lengths, blocks, (unit, unit, 1.0), strict=True)
    ]

    shift = torch.zeros(1, heads, d)

    def attention():
        out = torch.full((1, run.s_q, heads, d), math.nan)
        lse = torch.full((1, heads, run.s_q), math.nan)
        tensors = dict(zip(("q", "k", "v"), inputs, strict=True))
        scales = dict(zip(("q_scales", "k_scales", "v_scales"), descales, strict=True))
        kernel(
            kernel_arguments(
                **tensors,
                out=out,
                lse=lse,
                **scales,
                v_shift=shift,
                scale_log2=scale * math.log2(math.e),
                window_left=UNBOUNDED,
                window_right=UNBOUNDED,
                num_ctas=run.num_ctas,
                tiles=torch.zeros(1, dtype=torch.int32) if run.mask != "full" else None,
            )
        )
        return out, lse

    out, _ = emulator.compare_schedules(attention, FP8_SEEDS, checks=emulator.ALL_CHECKS)
    arrays = [values(*x) for x in zip(inputs, descales, map(str, blocks), strict=True)]
    wanted = Attention.of(*arrays, scale, run.mask == "causal")
    baseline = wanted.baseline(torch.float32, run.config.tile_n, not run.config.o_slice)
    assert_accurate("out", out, wanted.exact(torch.float32), baseline)


def without_scores_done(ptx: str) -> str:
    """The kernel without the wait for the others' last Q K^T before O is written."""
    lines = ptx.split("\n")
    first_store = next(i for i, line in enumerate(lines) if "stmatrix" in line)
    wait = max(i for i in range(first_store) if "bar.sync" in lines[i])
    assert lines[wait].strip().endswith(" 256;")
    return "\n".join(lines[:wait] + lines[wait + 1 :])


@pytest.mark.parametrize(
    "run",
    [
        Run("k", "full", 2, head_dim=128, s_q=128, s_k=192),
        Run("q", "full", 2, head_dim=128, head_dim_v=128, s_q=128, s_k=192),
    ],
    ids=str,
)
def test_output_written_too_early_is_found(run, device):
    from fa3 import emulator

    attention = function(run, *inputs(run))
    with emulator.options(edit=without_scores_done):
        with pytest.raises(emulator.ScheduleDifference, match="output 0 differs") as found:
            emulator.compare_schedules(attention, SEEDS, checks=())
        assert found.value.index[1] >= 64, "the rows of the second warpgroup"
        with emulator.options(checks=("race",), schedule="eager"):
            with pytest.raises(emulator.Race, match="wgmma of warps .*stmatrix") as found:
                attention()
        assert "store.py:" in str(found.value)


def without_warp_barrier_after_store(ptx: str) -> str:
    """The kernel whose lanes do not meet between their waits for a store and a release of its slot.

    All lanes of a warp issue a TMA store, in PTX, and each waits for its own.
    """
    edited, count = re.subn(
        r"(cp\.async\.bulk\.wait_group\.read\s+0;(?:\s*\.loc[^\n]*)*)\s*bar\.warp\.sync\s+-1;",
        r"\1",
        ptx,
    )
    assert count == 1
    return edited


def test_a_slot_released_before_every_lane_has_waited_is_found(device):
    from fa3 import emulator

    run = Run("q", "full", 2, head_dim=128, head_dim_v=128, s_q=200, s_k=150)
    attention = function(run, *inputs(run))
    with emulator.options(edit=without_warp_barrier_after_store, checks=("race",)):
        with pytest.raises(
            emulator.Race, match="TMA load .* the read by TMA store of warp"
        ) as found:
            attention()
    assert "store.py:" in str(found.value)
