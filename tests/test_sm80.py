"""The kernels of Ampere and Ada through the public functions, on the emulator or a Hopper GPU."""

import itertools

import pytest
import torch

import fa3
from fa3.inspect.cli import inspect
from fa3.inspect.elf import Cubin
from fa3.inspect.model.ampere import Bound
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.ctas import MAX_CTAS
from fa3.kernels.signature import HEAD_DIM_TILES, Signature
from fa3.kernels.simple.deal import WARP
from fa3.kernels.sm80.backward.plan import BwdPlan
from fa3.kernels.sm80.config import SMEM_OF_SM, Sm80Config
from fa3.kernels.sm80.forward.kernel import FwdPlan
from fa3.launch import dispatch, jit, tuning
from perf import static, variants

from . import test_forward, test_ragged
from .ampere import LARGE, SMALL
from .cases import Case
from .conftest import HOPPER
from .ragged_cases import RaggedCase

# Every pair of a capability and a row of the table, every kind of mask, odd lengths and head dims.
DENSE = [
    (LARGE, Case()),
    (LARGE, Case("fp16", 64, 64, s_q=200, s_k=333, causal=True, h_q=4, layout="bhsd")),
    (LARGE, Case("bf16", 72, 88, 2, s_q=77, s_k=200, window=(30, 20), num_ctas=1)),
    (SMALL, Case("fp16", 96, 96, s_q=130, s_k=70, causal=True, layout="packed", sink="head")),
    (LARGE, Case("bf16", 128, 128, s_q=140, s_k=100, causal=True, softmax_scale=0.3)),
    (SMALL, Case("fp16", 104, 120, s_q=33, s_k=150, h_q=3, h_k=1, layout="sbhd", softcap=5.0)),
    (LARGE, Case("fp16", 192, 128, s_q=129, s_k=140, layout="expanded", batch=2, h_q=1, h_k=1)),
    (LARGE, Case("bf16", 184, 192, s_q=140, s_k=130, causal=True, h_q=1, h_k=1)),
    (SMALL, Case("bf16", 64, 184, s_q=20, s_k=80, window=(9, 0), sink="batch")),
    (LARGE, Case("bf16", 256, 256, s_q=40, s_k=150, causal=True, h_q=1, h_k=1)),
    (SMALL, Case("fp16", 248, 200, s_q=130, s_k=65, num_ctas=1, h_q=2, h_k=1)),
]


@pytest.mark.parametrize(("capability", "case"), DENSE, ids=str)
def test_accuracy(capability, case, device, ampere):
    ampere(capability)
    test_forward._check(case, device)


RAGGED = [
    (LARGE, RaggedCase((70, 0, 130), (200, 40, 0), causal=True)),
    (
        SMALL,
        RaggedCase((1, 65, 33), (100, 64, 1), "slack", "dense", "fp16", 120, 104, window=(30, 20)),
    ),
    (LARGE, RaggedCase((140, 3), (60, 90), "dense", "slack", "fp16", 96, 88, 4, 2, num_ctas=1)),
]


@pytest.mark.parametrize(("capability", "case"), RAGGED, ids=str)
def test_sequences_of_different_lengths(capability, case, device, ampere):
    ampere(capability)
    test_ragged._check(case, device)


@pytest.mark.skipif(HOPPER, reason="schedules are the emulator's")
@pytest.mark.parametrize(
    ("capability", "head_dim"),
    [(LARGE, 64), (SMALL, 96), (LARGE, 256)],
    ids=["two stages", "one stage", "pairs of warps"],
)
def test_every_schedule_gives_the_same(capability, head_dim, device, ampere):
    """Several tiles per CTA, several blocks per tile."""
    from fa3 import emulator

    ampere(capability)
    q, k, v = (torch.randn(1, n, 1, head_dim).bfloat16() for n in (200, 270, 270))
    margin = dispatch.EMULATED_SMS - 1

    def attention():
        options = {"causal": True, "sm_margin": margin, "return_attn_probs": True}
        return fa3.flash_attn_func(q, k, v, **options)

    emulator.compare_schedules(attention, range(3), checks=emulator.ALL_CHECKS)


@pytest.mark.skipif(HOPPER, reason="mutants run on the emulator")
@pytest.mark.parametrize(
    ("capability", "head_dim", "head_dim_v"),
    [(LARGE, 96, 128), (SMALL, 96, 96)],
    ids=["two stages", "one stage"],
)
def test_no_synchronisation_can_be_left_out(capability, head_dim, head_dim_v, device, ampere):
    """But a warp barrier between reads by ldmatrix, which is a warp's instruction, and writes."""
    from fa3.emulator.mutation import Judge

    ampere(capability)
    q, k, v = (
        torch.randn(1, n, 1, d).bfloat16()
        for n, d in ((260, head_dim), (150, head_dim), (150, head_dim_v))
    )
    judge = Judge(lambda: [fa3.flash_attn_func(q, k, v, sm_margin=dispatch.EMULATED_SMS - 1)])
    assert len(judge.mutants) > 10
    survivors = [m for m in judge.mutants if judge.verdict(m) is None]
    assert all("sync_warp" in m.source for m in survivors), list(map(str, survivors))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)], ids=str)
def test_one_byte_inputs_are_refused_with_a_remedy(capability):
    target = dispatch.Target("gpu", "NVIDIA L4", capability, 58)
    from .test_dispatch import FP8_SIGNATURE

    with pytest.raises(NotImplementedError) as caught:
        dispatch.forward(FP8_SIGNATURE, target)
    assert "NVIDIA L4 has no kernel for FP8" in str(caught.value)
    assert "give q, k and v in bf16 or fp16" in str(caught.value)


def test_every_signature_has_a_config_that_fits():
    used = set()
    for capability, smem in SMEM_OF_SM.items():
        for d, dv in itertools.product(HEAD_DIM_TILES, HEAD_DIM_TILES):
            signature = Signature("bf16", d, dv, "full")
            config = tuning.forward(signature, capability)
            config.check(signature, smem)
            used.add(config)
    assert used == set(itertools.chain(*tuning.FORWARD_SM80.values()))


# SMs of the largest GPU of a capability, or of any that comes near.
SMS = {(8, 0): 108, (8, 6): 84, (8, 9): 142, (10, 0): 160, (12, 0): 188}


@pytest.mark.parametrize("capability", SMS, ids=str)
def test_a_list_of_tiles_has_room_for_all_ctas(capability):
    """On an A100 with two per SM 216."""
    for d, dv in itertools.product(HEAD_DIM_TILES, HEAD_DIM_TILES):
        signature = Signature("bf16", d, dv, "full")
        config = tuning.forward(signature, capability)
        tiling = FwdPlan(signature, config).tiling
        assert SMS[capability] * config.ctas_per_sm <= tiling.max_ctas <= MAX_CTAS
        assert tiling.max_ctas % WARP == 0
        signature = BwdSignature("bf16", *tuning.backward_tiles(d, dv), "full")
        tiling = BwdPlan(signature, tuning.backward(signature, capability)).tiling
        assert SMS[capability] <= tiling.max_ctas <= MAX_CTAS


def test_a_config_that_no_kernel_can_have():
    signature = Signature("bf16", 128, 128, "full")
    for name, value in (
        ("tile_n", 40),
        ("num_warps", 3),
        ("rows_per_warp", 64),
        ("num_stages", 3),
        ("ctas_per_sm", 0),
        ("q_in_registers", 40),
        ("warps_per_row", 4),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
            Sm80Config(**({"tile_n": 64} | {name: value})).check(signature)
    with pytest.raises(ValueError, match="needs 131072 bytes.*the limit is 82944"):
        Sm80Config(tile_n=96, num_stages=2).check(signature)


# Issue slots per exponential of FlashAttention-2's C++ kernels.
FLASH_ATTENTION_2 = {64: 8.6, 96: 10.4, 128: 13.0, 192: 17.3, 256: 21.3}


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_newer_gpus_get_code_of_their_own(arch, device):
    """Which has run nowhere."""
    signature, capability = Signature("bf16", 64, 64, "full"), (int(arch[3:-1]), 0)
    where = dispatch.forward(signature, dispatch.Target("gpu", "", capability, 1, arch)).where
    config = tuning.forward(signature, capability)
    assert Cubin.parse(jit.artifacts(where, signature, config, arch).cubin).sm == int(arch[3:])


@pytest.mark.parametrize("variant", variants.ampere(), ids=lambda variant: variant.name)
def test_nothing_spills(variant, device):
    found = inspect(variant.signature, target=variant.target)
    report = found.report
    assert report.resources.sm == int(variant.arch[3:])
    assert report.resources.frame == 0
    floors = Bound.of(report, variant.target.capability, is_backward=False).floors
    assert floors["shared memory"] <= floors["tensor cores"]
    slots = report.steady.straight.per_exponential
    assert slots < FLASH_ATTENTION_2[variant.signature.head_dim]
    assert static.worse(static.read()[variant.name], static.Line.of(found)) == []
