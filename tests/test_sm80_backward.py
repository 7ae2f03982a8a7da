"""Gradients on Ampere and Ada, on the emulator or a Hopper GPU, and the SASS of their kernels."""

import math
import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from fa3 import autograd, emulator
from fa3.call.mask import MaskSpec
from fa3.emulator.mutation import Judge
from fa3.inspect.cli import inspect
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import head_dim_tile
from fa3.kernels.sm80.bwd_config import Sm80BwdConfig
from fa3.kernels.sm80.config import SMEM_OF_SM
from fa3.launch import dispatch, tuning
from perf import static, variants

from . import test_backward_ragged
from .ampere import LARGE, SMALL
from .backward_cases import BackwardCase, attention, check, gradients
from .cases import make_inputs
from .conftest import HOPPER
from .test_backward_ragged import RaggedBackwardCase

# Every row of the table and both sizes of shared memory, every kind of mask, odd lengths and dims.
CASES = [
    (LARGE, BackwardCase("fp16", s_q=70, s_k=200, causal=True, h_q=4, with_lse=True)),
    (LARGE, BackwardCase("bf16", 72, 88, s_q=77, s_k=130, window=(30, 20), num_ctas=1)),
    (LARGE, BackwardCase("bf16", 128, 128, s_q=140, s_k=100, causal=True, softmax_scale=0.3)),
    (SMALL, BackwardCase("fp16", 104, 120, s_q=33, s_k=150, h_q=3, h_k=1, layout="bhsd")),
    (LARGE, BackwardCase("fp16", 192, 128, s_q=70, s_k=110, layout="packed", h_q=1, h_k=1)),
    (SMALL, BackwardCase("bf16", 64, 184, s_q=20, s_k=70, window=(9, 0), h_q=2, h_k=1)),
    (LARGE, BackwardCase("bf16", 256, 256, s_q=65, s_k=70, causal=True, h_q=1, h_k=1)),
    (SMALL, BackwardCase("fp16", 248, 200, s_q=40, s_k=70, h_q=1, h_k=1, with_lse=True)),
    (LARGE, BackwardCase(s_q=70, s_k=140, h_k=1, causal=True, softcap=5.0, sink="head")),
    (
        LARGE,
        BackwardCase(
            *("fp16", 192, 192, 2, 1, 1, 70, 100), window=(30, 20), softcap=20.0, sink="batch"
        ),
    ),
]
# Packed and dense, rows of nobody, sequences without a query or a key; two and one warps a key.
RAGGED = [
    (
        LARGE,
        RaggedBackwardCase(
            *((66, 0, 5, 80), (100, 40, 0, 33)), h_k=1, causal=True, num_ctas=1, with_lse=True
        ),
    ),
    (
        LARGE,
        RaggedBackwardCase(
            *((70, 0, 9), (200, 9, 30), "slack", "dense", "fp16", 128, 128, 1, 1),
            window=(30, 20),
            layout="packed",
            deterministic=True,
            softcap=5.0,
        ),
    ),
    (
        LARGE,
        RaggedBackwardCase(
            *((1, 40), (70, 30), "dense", "packed", "bf16", 192, 128, 2, 1), causal=True
        ),
    ),
    (
        SMALL,
        RaggedBackwardCase(
            *((1, 1, 64), (7, 70, 64), "dense", "slack", "bf16", 256, 248, 1, 1), num_ctas=1
        ),
    ),
]


@pytest.mark.parametrize(("capability", "case"), CASES, ids=str)
def test_accuracy(capability, case, device, ampere):
    ampere(capability)
    check(case, device)


@pytest.mark.parametrize(("capability", "case"), RAGGED, ids=str)
def test_sequences_of_different_lengths(capability, case, device, ampere, poisoned):
    ampere(capability)
    test_backward_ragged.check(case, device)


def _inputs(case, device):
    return [x.values.clone().requires_grad_() for x in make_inputs(case, device)]


def test_rows_that_see_no_key_have_no_gradient(device, ampere):
    """Whatever comes back for them."""
    ampere(LARGE)
    case = BackwardCase("fp16", s_q=70, s_k=40, causal=True)
    inputs = _inputs(case, device)
    out, lse = results = attention(case, *inputs, device)
    blind = case.s_q - case.s_k
    assert (lse[:, :, :blind] == -math.inf).all()
    dlse = torch.randn_like(lse)
    dlse[:, :, :blind] = math.nan
    dq, dk, dv = gradients(results, inputs, torch.randn_like(out), dlse)
    assert (dq[:, :blind] == 0).all() and (dq[:, blind:] != 0).any(dim=-1).all()
    assert dk.isfinite().all() and dv.isfinite().all()


def test_keys_that_no_query_sees_have_no_gradient(device, ampere):
    """Nor those of a tile that no query visits."""
    ampere(LARGE)
    case = BackwardCase(head_dim=72, head_dim_v=88, s_q=20, s_k=200, window=(20, 0))
    inputs = _inputs(case, device)
    results = attention(case, *inputs, device)
    _, dk, dv = gradients(results, inputs, torch.ones_like(results[0]))
    unseen = case.s_k - case.s_q - 20
    assert (dk[:, :unseen] == 0).all() and (dv[:, :unseen] == 0).all()
    assert (dv[:, unseen:] != 0).any(dim=-1).all()


SEVERAL_TILES = BackwardCase("fp16", s_q=70, s_k=200, h_k=1, causal=True, num_ctas=1)
SPLIT_QUERIES = BackwardCase("fp16", 192, 128, s_q=70, s_k=110, h_k=1, num_ctas=1)


@pytest.mark.parametrize(
    ("case", "names"),
    [(SEVERAL_TILES, "kv"), (SEVERAL_TILES, "q"), (SPLIT_QUERIES, "q")],
    ids=["dk and dv", "dq", "dq, two warps a key"],
)
def test_gradients_of_some_inputs(case, names, device, ampere, monkeypatch):
    """The bits of the whole pass: one CTA adds its tiles to dQ one after the other."""
    ampere(LARGE)
    signatures, made = [], autograd.signature_of
    monkeypatch.setattr(
        autograd, "signature_of", lambda *x: signatures.append(made(*x)) or signatures[-1]
    )
    inputs = dict(zip("qkv", _inputs(case, device), strict=True))
    results = attention(case, *inputs.values(), device)
    dout = torch.randn_like(results[0])
    whole = dict(zip("qkv", gradients(results, [*inputs.values()], dout), strict=True))
    given = [x if name in names else x.detach() for name, x in inputs.items()]
    results = attention(case, *given, device)
    some = gradients(results, [inputs[name] for name in names], dout)
    assert all(torch.equal(x, whole[name]) for name, x in zip(names, some, strict=True))
    last = signatures[-1]
    assert (last.with_dq, last.with_dkv) == ("q" in names, "kv" == names)


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
def test_order_of_warps_and_copies_does_not_change_the_bits(device, ampere):
    """Several tiles of one CTA, several blocks and heads of a tile."""
    ampere(LARGE)
    case = BackwardCase(s_q=70, s_k=200, h_q=2, h_k=1)
    q, k, v = (x.values for x in make_inputs(case, device))
    out, lse = attention(case, q, k, v, device)
    dout, margin = torch.randn_like(out), dispatch.EMULATED_SMS - 1

    def backward():
        given = dout, q, k, v, out, lse
        return torch.ops.fa3.backward(*given, causal=True, sm_margin=margin, deterministic=True)

    emulator.compare_schedules(backward, range(2), checks=emulator.ALL_CHECKS)


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
def test_a_fixed_order_of_sequences_is_kept(device, ampere):
    """Also gradients of rows that belong to nobody."""
    ampere(LARGE)
    case = replace(RAGGED[1][1], num_ctas=1)
    call = test_backward_ragged.Call.of(case, device)
    emulator.compare_schedules(lambda: call.gradients(device), seeds=range(1))


@pytest.mark.skipif(HOPPER, reason="mutants run on the emulator")
def test_no_synchronisation_can_be_left_out(device, ampere):
    """A sample; FA3_ARCH=sm_80 python -m fa3.emulator mutants judges all."""
    ampere(LARGE)
    case = BackwardCase(s_q=50, s_k=130, h_q=1, h_k=1, causal=True, softcap=5.0)
    q, k, v = (x.values for x in make_inputs(case, device))
    out, lse = attention(case, q, k, v, device)
    given = torch.randn_like(out), q, k, v, out, lse
    margin = dispatch.EMULATED_SMS - 1
    judge = Judge(
        lambda: torch.ops.fa3.backward(*given, causal=True, softcap=5.0, sm_margin=margin),
        seeds=range(2),
    )
    reached = [m for m in judge.mutants if judge.reaches(m)]
    assert len(reached) > 20
    sample = random.Random(0).sample(reached, 8)
    survivors = [m for m in sample if judge.verdict(m) is None]
    # Ahead of the store a copy is in flight only where no query sees the tile.
    assert [str(m) for m in survivors if m.kind != "wait"] == [] and len(survivors) <= 2


def _configs() -> set:
    """All of the tables."""
    rows = *tuning.BACKWARD_SM80.values(), *tuning.BACKWARD_SM80_SOFTCAP.values()
    return {config for row in rows for config in row}


def test_every_signature_has_a_config_that_fits():
    used = set()
    for capability, smem in SMEM_OF_SM.items():
        for row, score in product(tuning.BACKWARD, (None, "softcap")):
            signature = BwdSignature("bf16", *row, "full", score=score)
            config = tuning.backward(signature, capability)
            config.check(signature, smem)
            used.add(config)
    assert used == _configs()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile_m": 48}, "tile_m is 48, expected 32 or 64"),
        ({"tile_n": 96}, "tile_n is 96, expected a multiple of 64 from 64 to 128"),
        ({"key_warps": 1}, "key_warps is 1, expected 2 or 4"),
        ({"num_stages": 3}, "num_stages is 3, expected 1 or 2"),
        ({"score_slices": 3}, r"score_slices is 3, expected one of \[1, 2\]"),
        ({"v_in_registers": 32}, r"v_in_registers is 32, expected one of \[0, 64, 128\]"),
        ({"k_in_registers": 64}, "tile_n is 128, expected less: it takes 224 registers"),
    ],
    ids=str,
)
def test_a_config_that_no_kernel_can_have(changes, words):
    signature = BwdSignature("bf16", 128, 128, "full")
    with pytest.raises(ValueError, match=words):
        Sm80BwdConfig(**({"tile_m": 64, "tile_n": 128} | changes)).check(signature)


def test_too_few_queries_for_all_warps():
    """Of 32 x 96 elements of dQ."""
    signature = BwdSignature("bf16", 96, 128, "full")
    words = "tile_m is 32, expected 64: 8 warps cannot split 32 queries of dQ with 96"
    with pytest.raises(ValueError, match=words):
        Sm80BwdConfig(tile_m=32, tile_n=128).check(signature)


def test_a_config_that_needs_too_much_memory():
    signature = BwdSignature("bf16", 128, 128, "full")
    with pytest.raises(ValueError, match="needs 148480 bytes.*the limit is 101376"):
        Sm80BwdConfig(64, 128, score_slices=2).check(signature, SMEM_OF_SM[SMALL])


def _signature_of(case: BackwardCase | RaggedBackwardCase) -> BwdSignature:
    tiles = tuning.backward_tiles(head_dim_tile(case.head_dim), head_dim_tile(case.head_dim_v))
    mask = MaskSpec.of(case.causal, *case.window).kind
    is_ragged = isinstance(case, RaggedBackwardCase)
    deterministic = is_ragged and case.deterministic
    score = "softcap" if case.softcap else None
    return BwdSignature(case.dtype, *tiles, mask, deterministic, is_ragged, score)


# head dims -> at most so many issue slots per exponential, of both sides together; copies included,
# waiting for one's turn not
# (FlashAttention-2's C++: 17.8, 23.3, 28.1, 45.2, 58.7 at head dims 64, 96, 128, 192, 256)
SLOTS = {
    (64, 64): 17.8,
    (96, 96): 23.3,
    (128, 128): 28.0,
    (192, 128): 45.0,
    (192, 192): 45.0,
    (256, 256): 59.0,
}


@pytest.mark.parametrize("variant", variants.ampere_backward(), ids=lambda variant: variant.name)
def test_lean(variant, device):
    """Nothing spills; a step takes both sides one way round their loops."""
    found = inspect(variant.signature, target=variant.target)
    report, signature = found.report, variant.signature
    assert report.resources.sm == int(variant.arch[3:])
    assert (report.resources.frame, report.local.loads, report.local.stores) == (0, 0, 0)
    assert report.resources.registers * found.config.num_threads <= 65_536
    line = static.Line.of(found)
    if signature.score is None:  # with softcap there are two exponentials per score
        slots = line.slots_per_exp if signature.deterministic else line.slots_with_all
        assert slots <= SLOTS[signature.head_dim, signature.head_dim_v]
    assert static.worse(static.read()[variant.name], line) == []


def test_every_config_and_every_case_is_among_them():
    looked_at = [(x.signature, x.target.capability) for x in variants.ampere_backward()]
    assert {tuning.backward(*x) for x in looked_at} == _configs()
    assert {(_signature_of(case), size) for size, case in CASES + RAGGED} <= set(looked_at)
    assert set(SLOTS) == set(tuning.BACKWARD_SM80) == set(tuning.BACKWARD)
