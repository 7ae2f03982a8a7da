"""16-bit queries beside keys and values of one byte: accuracy, what is stored, what is refused."""

from dataclasses import replace

import pytest
import torch

import fa3
from fa3 import append, emulator
from fa3.launch import dispatch

from . import test_kvcache
from .accuracy import assert_accurate, assert_lse
from .cache_cases import CacheCase, Call
from .conftest import HOPPER
from .reference import baseline, exact

E4M3 = torch.float8_e4m3fn
SMALL = CacheCase(num_new=2, rotary="halves", cache="e4m3")
CASES = [
    SMALL,
    CacheCase(
        **{"num_queries": (1, 70), "num_new": 5, "pages": 0, "causal": False, "cache": "e4m3"},
        **{"dtype": "fp16", "head_dim": 128, "head_dim_v": 112},
    ),
    CacheCase(
        **{"num_queries": (1, 1), "pages": 64, "h_q": 6, "h_k": 1, "cache": "e4m3"},
        **{"head_dim": 192, "head_dim_v": 128, "causal": False, "window": (90, 0)},
    ),
    CacheCase(pages=20, num_new=2, leftpad=(70, 5), h_q=2, cache="e4m3"),
    CacheCase(
        **{"num_new": 1, "pages": -1, "rotary": "interleaved", "cache": "e4m3"},
        **{"dtype": "fp16", "head_dim": 256, "head_dim_v": 240, "h_q": 2},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, device):
    test_kvcache._check(case, device)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_plain_torch(case, plain_torch):
    append._run_of.cache_clear()
    test_kvcache._check(case, torch.device("cpu"))
    append._run_of.cache_clear()


@pytest.mark.parametrize("num_splits", [2, 5])
def test_splits(num_splits, device):
    case = CacheCase(dtype="bf16", head_dim=96, head_dim_v=80, lengths=(300, 37), cache="e4m3")
    call = Call(replace(case, causal=False), device)
    given = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments(), num_splits=num_splits)
    for (out, lse), qkv in zip(call.parts(*given), call.expected(), strict=True):
        wanted, wanted_lse, by_torch = call.exact_and_baseline(*qkv)
        assert_accurate("out", out, wanted, by_torch)
        assert_lse("lse", lse, wanted_lse)


def test_equal_lengths_with_softcap_and_sink(device):
    """Every code of a byte; a NaN is one."""
    q = torch.randn(1, 20, 4, 64).half().to(device)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127]
    k, v = (codes[torch.randint(len(codes), (1, 300, 2, 64))].to(device) for _ in range(2))
    v[:, -1], k, v = 127, k.view(E4M3), v.view(E4M3)
    sink = torch.randn(4).to(device)
    k_descale, v_descale = (torch.full((1, 2), x, device=device) for x in (0.02, 0.5))
    more = {"softcap": 3.0, "learnable_sink": sink, "return_attn_probs": True}
    given = {"k_descale": k_descale, "v_descale": v_descale, **more}
    out, lse = fa3.flash_attn_func(q, k[:, :-1], v[:, :-1], **given)
    values = [x[:, :-1].float() * scale for x, scale in ((k, 0.02), (v, 0.5))]
    wanted, wanted_lse = exact(q, *values, softcap=3.0, sink=sink)
    by_torch = baseline(q, *(x.half() for x in values), softcap=3.0, sink=sink)
    assert_accurate("out", out, wanted, by_torch)
    assert_lse("lse", lse, wanted_lse)
    out = fa3.flash_attn_func(q, k, v, **given)[0]
    assert out.isnan().all()


def test_pages_hold_what_rows_do(device):
    """Bit by bit: varlen_func of pages and of dense rows."""
    call = Call(CacheCase(pages=48, cache="e4m3"), device)
    out, _ = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
    for i, (q, k, v) in enumerate(call.stored()):
        scales = {name: x[i : i + 1] for name, x in call.descales.items()}
        wanted = fa3.flash_attn_func(q, k, v, causal=True, **scales)
        assert torch.equal(out[i : i + 1], wanted)


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
def test_results_are_the_same_under_every_schedule(device):
    call = Call(replace(SMALL, lengths=(300, 60), num_queries=(1, 70)), device)

    def attention():
        out, lse = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
        return out, lse

    emulator.compare_schedules(attention, range(2), checks=emulator.ALL_CHECKS)
    test_kvcache._check_caches(call)


def test_new_rows_saturate_and_keep_nan(device):
    """Codes of what the largest one times the scale does not reach; a NaN stays one."""
    call = Call(replace(SMALL, rotary=None), device)
    call.new_k[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e4])
    given = call.arguments()
    fa3.flash_attn_with_kvcache(call.queries(), **given)
    page, row = (x[SMALL.lengths[0]] for x in call.places[0])
    stored = call.k_cache.tensor[page, row, 0, :4].float()
    assert stored[[0, 1, 3]].tolist() == [448, -448, 448] and stored[2].isnan()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"k_cache": torch.float8_e5m2}, TypeError, ["k has dtype", "float8_e5m2", "bfloat16"]),
        ({"v_cache": torch.bfloat16}, TypeError, ["v has dtype", "bfloat16", "float8_e4m3fn"]),
        ({"q_descale": (2, 2)}, ValueError, ["q_descale", "bfloat16", "None"]),
        ({"k_descale": (2, 4)}, ValueError, ["k_descale", "(2, 4)", "(2, 2)"]),
        ({"v_descale": (2, 2, 1)}, ValueError, ["v_descale", "(2, 2, 1)", "(2, 2)"]),
        ({"k": E4M3}, ValueError, ["k has dtype", "float8_e4m3fn", "bfloat16"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input(changes, error, words, device):
    """Nothing is written."""
    given = {
        "q": torch.zeros(2, 1, 4, 64).bfloat16(),
        "k_cache": torch.zeros(2, 16, 2, 64).to(E4M3),
        "v_cache": torch.zeros(2, 16, 2, 64).to(E4M3),
        "k": torch.ones(2, 1, 2, 64).bfloat16(),
        "v": torch.ones(2, 1, 2, 64).bfloat16(),
        "cache_seqlens": torch.tensor([5, 9], dtype=torch.int32),
    }
    for name, change in changes.items():
        given[name] = torch.ones(change) if isinstance(change, tuple) else given[name].to(change)
    given = {name: x.to(device) for name, x in given.items()}
    with pytest.raises(error) as caught:
        fa3.flash_attn_with_kvcache(**given)
    for word in words:
        assert word in str(caught.value)
    assert not given["k_cache"].float().any()


def test_head_dim_is_a_multiple_of_what_16_bytes_hold(plain_torch):
    q, k = torch.zeros(1, 8, 1, 72).bfloat16(), torch.zeros(1, 8, 1, 72).to(E4M3)
    with pytest.raises(ValueError, match="q has head dim 72, expected a multiple of 16"):
        fa3.flash_attn_func(q, k, k)


def test_without_a_backward_pass(plain_torch):
    q, k = torch.zeros(1, 8, 1, 64).bfloat16(), torch.zeros(1, 8, 1, 64).to(E4M3)
    with pytest.raises(NotImplementedError, match=r"k has dtype torch.float8_e4m3fn beside q"):
        fa3.flash_attn_func(q.requires_grad_(), k, k)


def test_what_quantises_takes_16_bits_throughout(plain_torch):
    q, k = torch.zeros(1, 8, 1, 64).bfloat16(), torch.zeros(1, 8, 1, 64).to(E4M3)
    for function in (fa3.flash_attn_fp8_func, fa3.quantize_fp8):
        with pytest.raises(TypeError, match=r"k has dtype .*e4m3fn.* expected torch.bfloat16"):
            function(q, k, k)


def test_ampere_has_no_kernel(plain_torch, monkeypatch):
    target = dispatch.Target("gpu", "A100", (8, 0), 108, "sm_80")
    monkeypatch.setattr(dispatch, "target_of", lambda device: target)
    q, k = torch.zeros(1, 9, 1, 64).bfloat16(), torch.zeros(1, 9, 1, 64).to(E4M3)
    with pytest.raises(NotImplementedError, match="A100 has no kernel for FP8"):
        fa3.flash_attn_func(q, k, k)
