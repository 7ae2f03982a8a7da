"""get_scheduler_metadata: a list that is made once serves all calls of a step, and no other."""

import pytest
import torch

import fa3
from fa3 import append, emulator
from fa3.call.listed import ATTRIBUTE

from .cache_cases import CacheCase, Call
from .conftest import HOPPER

DECODE = CacheCase(num_queries=(1, 1), num_new=1, h_q=6, lengths=(500, 37))
CASES = [
    (DECODE, 0),
    (DECODE, 3),
    (CacheCase(num_queries=(1, 70), num_new=2, rotary="halves"), 1),
    (CacheCase(num_queries=(4, 4), pages=-1, h_q=6, window=(90, -1)), 1),
]


def _metadata(call: Call, num_splits: int, **changes):
    case = call.case
    given = {
        "batch_size": len(case.lengths),
        "max_seqlen_q": max(case.num_queries),
        "max_seqlen_k": max(case.lengths) + case.num_new,
        "num_heads_q": case.h_q,
        "num_heads_kv": case.h_k,
        "headdim": case.head_dim,
        "cache_seqlens": call.seqlens,
        "qkv_dtype": call.q[0].dtype,
        "headdim_v": case.head_dim_v,
        "cu_seqlens_q": call.arguments().get("cu_seqlens_q"),
        "page_size": case.pages if case.pages > 0 else None,
        "max_seqlen_k_new": case.num_new,
        "causal": case.causal,
        "window_size": case.window,
        "num_splits": num_splits,
    }
    return fa3.get_scheduler_metadata(**given | changes)


def _attention(call: Call, **more):
    call._place()
    return fa3.flash_attn_with_kvcache(call.queries(), **call.arguments(), **more)


@pytest.mark.parametrize(("case", "num_splits"), CASES, ids=str)
def test_no_bit_changes(case, num_splits, device):
    """One kernel less runs. A list of other numbers of keys only makes another order."""
    call = Call(case, device)
    metadata = _metadata(call, num_splits)
    number = getattr(metadata, ATTRIBUTE).num_splits
    assert number == (num_splits or 1)  # 4 blocks of keys are too few to choose more
    of_others = _metadata(call, number, cache_seqlens=torch.full_like(call.seqlens, 5))
    results, counts = [], []
    for given in (None, metadata, of_others, metadata.clone()):
        emulator.launches.clear()
        results.append(_attention(call, num_splits=number, scheduler_metadata=given))
        counts.append(len(emulator.launches))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    assert HOPPER or counts == [counts[0], *[counts[0] - 1] * 3]


def test_few_queries_have_the_same_bits_beside_many(device):
    """Where all have few, tiles have 64 rows, and so have those of the list."""
    call = Call(CacheCase(num_queries=(3, 60), lengths=(333, 200)), device)
    tiles, results = [], []
    for ends in ((0, 3, 63), (0, 3, 23)):
        changes = {"cu_seqlens_q": torch.tensor(ends).int().to(device)}
        changes["max_seqlen_q"] = ends[2] - ends[1]
        metadata, q = _metadata(call, 3, **changes), call.queries()[: ends[-1]]
        given = call.arguments() | changes | {"num_splits": 3}
        out, _ = fa3.flash_attn_with_kvcache(q, **given)
        listed, _ = fa3.flash_attn_with_kvcache(q, **given, scheduler_metadata=metadata)
        assert torch.equal(out, listed)
        tiles.append(getattr(metadata, ATTRIBUTE).tile_m)
        results.append(out[:3])
    assert tiles == [192, 64] and torch.equal(*results)


def test_varlen_func_takes_it(device):
    call = Call(CacheCase(num_queries=(1, 70)), device)
    given = call.arguments()
    lengths = given["cu_seqlens_q"], None, 70, None
    more = {"seqused_k": call.seqlens, "page_table": call.table, "causal": True}
    tensors = call.queries(), call.k_cache.tensor, call.v_cache.tensor
    wanted = fa3.flash_attn_varlen_func(*tensors, *lengths, **more)
    metadata = _metadata(call, 1, pack_gqa=False)
    out = fa3.flash_attn_varlen_func(*tensors, *lengths, **more, scheduler_metadata=metadata)
    assert torch.equal(out, wanted)
    with pytest.raises(ValueError, match="made for heads 2, but the call has 4"):
        metadata = _metadata(call, 1, pack_gqa=True)
        fa3.flash_attn_varlen_func(*tensors, *lengths, **more, scheduler_metadata=metadata)


REFUSED = [
    ({"batch_size": 3, "cache_seqlens": 5}, ["batch size 3", "2"]),
    ({"num_heads_q": 12, "pack_gqa": False}, ["heads 12", "2"]),
    ({"num_heads_kv": 1}, ["heads 1", "2"]),
    ({"max_seqlen_q": 5}, ["queries 15", "3"]),
    ({"num_splits": 2}, ["num splits 2", "3"]),
    ({"sm_margin": 8}, ["ctas 124", "132"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda x: next(iter(x)))
def test_another_call_is_refused(changes, words, device):
    """Before anything is written."""
    if HOPPER and "sm_margin" in changes:
        words = ["ctas"]
    call = Call(DECODE, device)
    before = call.k_cache.tensor.clone()
    metadata = _metadata(call, **{"num_splits": 3} | changes)
    with pytest.raises(ValueError, match="scheduler_metadata was made for") as caught:
        given = call.arguments() | {"num_splits": 3, "scheduler_metadata": metadata}
        fa3.flash_attn_with_kvcache(call.queries(), **given)
    for word in words:
        assert word in str(caught.value)
    assert torch.equal(call.k_cache.tensor.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.long(), ["dtype torch.int64", "torch.int32"]),
        (lambda x: x[:100].clone(), ["100 elements", "at least"]),
        (lambda x: x[None], ["shape (1, "]),
        (lambda x: x[1:], ["4 bytes past a multiple of 16"]),
        (lambda x: x.repeat_interleave(2)[::2], ["stride 2"]),
    ],
)
def test_bad_copies(change, words, device):
    call = Call(DECODE, device)
    metadata = _metadata(call, 3)
    with pytest.raises(ValueError) as caught:
        _attention(call, num_splits=3, scheduler_metadata=change(metadata))
    for word in words:
        assert word in str(caught.value)


def test_a_call_of_equal_lengths_makes_no_list_and_takes_any(device):
    """Its tiles are handed out by a counter, or their order is computed."""
    q, k, v = (torch.randn(1, 100, 2, 64, device=device).bfloat16() for _ in range(3))
    metadata = _metadata(Call(DECODE, device), 1)
    without, given = (
        fa3.flash_attn_with_kvcache(q, k, v, causal=True, num_splits=1, scheduler_metadata=x)
        for x in (None, metadata)
    )
    assert torch.equal(without, given)


def test_a_copy_does_not_know_the_number_of_splits(device):
    call = Call(DECODE, device)
    metadata = _metadata(call, 3).clone()
    with pytest.raises(ValueError, match="num_splits is 0 beside a scheduler_metadata"):
        _attention(call, scheduler_metadata=metadata)


def test_without_a_kernel(plain_torch):
    append._run_of.cache_clear()
    fa3.metadata._plan_of.cache_clear()
    call = Call(DECODE, torch.device("cpu"))
    wanted = _attention(call)
    given = _attention(call, scheduler_metadata=_metadata(call, 0))
    assert torch.equal(given[0], wanted[0])
    with pytest.raises(ValueError, match="made for batch size 3, but the call has 2"):
        sizes = 3, 1, 501, 6, 2, 64, torch.full((3,), 5, dtype=torch.int32)
        _attention(call, scheduler_metadata=fa3.get_scheduler_metadata(*sizes))
    append._run_of.cache_clear()
    fa3.metadata._plan_of.cache_clear()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": -1}, ValueError, ["batch_size is -1"]),
        ({"cache_seqlens": torch.zeros(3).int()}, ValueError, ["cache_seqlens", "(3,)", "(2,)"]),
        ({"cache_seqlens": torch.zeros(2)}, ValueError, ["cache_seqlens", "torch.int32"]),
        ({"qkv_dtype": torch.float32}, TypeError, ["qkv_dtype", "float32"]),
        ({"num_heads_q": 5}, ValueError, ["5 heads", "2 heads"]),
        ({"headdim": 100}, ValueError, ["head dim 100"]),
        ({"attention_chunk": 4}, NotImplementedError, ["attention_chunk"]),
        ({"num_heads": 4}, TypeError, ["num_heads_q is meant"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input(changes, error, words, plain_torch):
    sizes = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 501, "num_heads_q": 6}
    sizes |= {"num_heads_kv": 2, "headdim": 64, "cache_seqlens": torch.ones(2).int()}
    with pytest.raises(error) as caught:
        fa3.get_scheduler_metadata(**sizes | changes)
    for word in words:
        assert word in str(caught.value)
