"""A cluster whose CTAs share K and V: the bits of single CTAs, half of the reads, its mutants."""

import re
from dataclasses import replace

import pytest
import torch

import fa3
from fa3 import ops
from fa3.kernels.config import FwdConfig
from fa3.kernels.signature import Quantised, Signature
from fa3.kernels.sm90.cluster import Cluster
from fa3.launch import dispatch, tuning

from .conftest import HOPPER

SEEDS = range(1)
# head dim: queries, keys. O waits in the slots of K (128), in those of K and V (256), or in neither
# (64). The last block of keys ends in either CTA's half; a tile of each head has no rows but at 64.
SHAPES = {64: (300, 330), 128: (300, 600), 256: (140, 200)}


@pytest.fixture
def clustered(monkeypatch):
    """Makes all calls have a cluster of so many CTAs."""
    forward = tuning.forward

    def choose(size):
        monkeypatch.setattr(tuning, "forward", lambda *x: replace(forward(*x), cluster=size))
        ops.plan_of.cache_clear()

    yield choose
    ops.plan_of.cache_clear()


def call_of(device, head_dim, num_ctas, heads=4):
    s_q, s_k = SHAPES[head_dim]
    q = torch.randn(1, s_q, heads, head_dim).bfloat16().to(device)
    k, v = (torch.randn(1, s_k, 2, head_dim).bfloat16().to(device) for _ in "kv")
    margin = dispatch.target_of(device).num_sms - num_ctas
    return lambda: fa3.flash_attn_func(q, k, v, sm_margin=margin, return_attn_probs=True)


@pytest.mark.parametrize("head_dim", SHAPES)
def test_results_are_those_of_single_ctas(head_dim, device, clustered):
    """With several tiles per CTA, and one that belongs to no cluster."""
    call = call_of(device, head_dim, num_ctas=5)
    clustered(1)
    wanted = call()
    clustered(2)
    if HOPPER:
        found = call()
    else:
        from fa3 import emulator

        found = emulator.compare_schedules(call, SEEDS, checks=emulator.ALL_CHECKS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(HOPPER, reason="bytes are counted on the emulator")
def test_each_cta_reads_half_of_k_and_v(device, clustered):
    from fa3 import emulator

    call, read = call_of(device, 64, num_ctas=2), []
    for size in (1, 2):
        clustered(size)
        with emulator.profile() as profile:
            call()
        read.append(profile.launches[-1].total.bytes.bulk_read)
    row, (s_q, s_k), heads = 2 * 64, SHAPES[64], 4
    k_and_v = [found - heads * s_q * row for found in read]
    assert k_and_v == [heads * tiles * 2 * s_k * row for tiles in (2, 1)]  # 2 of 192 queries


# Refusals, and the arithmetic


@pytest.mark.parametrize(
    "signature",
    [
        Signature("bf16", 128, 128, "causal"),
        Signature("bf16", 128, 128, "local"),
        Signature("bf16", 128, 128, "full", is_ragged=True),
        Signature("bf16", 128, 128, "full").split(),
        Signature("e4m3", 128, 128, "full", Quantised("e4m3", "e4m3", "bf16")),
    ],
    ids=str,
)
def test_what_may_have_no_cluster(signature):
    config = replace(tuning.forward(signature), cluster=2)
    with pytest.raises(ValueError, match="cluster is 2, expected 1 but for 16-bit inputs"):
        config.check(signature)


def test_other_wrong_clusters():
    full = Signature("bf16", 128, 128, "full")
    with pytest.raises(ValueError, match="cluster is 3, expected 1 or 2"):
        FwdConfig(tile_n=128, cluster=3).check(full)
    with pytest.raises(ValueError, match="schedule is 'dynamic', expected static or None for a cl"):
        FwdConfig(tile_n=128, cluster=2, schedule="dynamic").check(full)
    FwdConfig(tile_n=128, cluster=2).check(replace(full, sinks=True))


def test_clusters_are_whole():
    assert [Cluster(2).whole(n) for n in (1, 2, 5, 132)] == [2, 2, 4, 132]
    assert Cluster(1).whole(5) == 5


# Mutants


@pytest.mark.skipif(HOPPER, reason="mutants run on the emulator")
def test_missing_synchronisation_of_a_cluster_is_caught(device, clustered):
    """Its barriers, at the start and at the end, and every arrival at the other CTA."""
    from fa3.emulator.mutation import Judge

    clustered(2)
    judge = Judge(call_of(device, 128, num_ctas=2, heads=2), SEEDS)
    own = [m for m in judge.mutants if m.place[0].endswith("cluster.py")]
    assert [m.kind for m in own] == ["arrive", "wait"] * 2
    own += [m for m in judge.mutants if m.instruction.startswith("mbarrier.arrive.shared::cluster")]
    assert len(own) == 9  # K: in the prologue, in the loop, with O in it; V: in the loop, last
    assert all(judge.verdict(m) for m in own)


WRONG = {  # what is found in the PTX, and what stands there instead
    "a mask without the other CTA": (r"(mov.b16\s+%rs\d+, )3;", r"\g<1>1;"),
    "both load the same half": ("%cluster_ctarank", "0"),
    "slots that only this CTA gives back": (r"(mov.b32\s+%r\d+, )16;", r"\g<1>8;"),
}


@pytest.mark.skipif(HOPPER, reason="mutants run on the emulator")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_cluster_is_caught(name, device, clustered):
    from fa3 import emulator

    pattern, other = WRONG[name]
    clustered(2)

    def edit(ptx: str) -> str:
        assert re.search(pattern, ptx)
        return re.sub(pattern, other, ptx)

    with emulator.options(edit=edit, checks=emulator.ALL_CHECKS):
        with pytest.raises(emulator.KernelError):
            call_of(device, 128, num_ctas=2, heads=2)()
