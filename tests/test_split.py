"""Keys split over CTAs: accuracy, the same bits in any company, and the kernel that combines."""

import math
from dataclasses import replace

import pytest
import torch

import fa3
from fa3 import emulator
from fa3.launch import dispatch, splits

from . import test_forward, test_fp8, test_ragged, test_ragged_fp8
from .accuracy import assert_accurate, assert_lse
from .cache_cases import CacheCase, Call
from .cases import Bordered, Case, make_inputs, pairwise
from .conftest import HOPPER
from .fp8_cases import Fp8Case
from .ragged_cases import RaggedCase

SEEDS = range(2)  # of random schedules
NUM_SPLITS = (0, 2, 3, 7)
FACTORS = {
    "num_splits": NUM_SPLITS,
    "lengths": ((1, 900), (100, 300), (257, 95)),  # s_q, s_k
    "heads": ((2, 2), (3, 1)),
    "layout": ("bshd", "packed"),
    "num_ctas": (None, 3),
}
LOCAL_FACTORS = {"num_splits": (2, 7), "lengths": ((200, 300), (1, 333)), "heads": ((2, 1), (3, 3))}
FP8_FACTORS = {"num_splits": (2, 7), "lengths": ((1, 500), (140, 140)), "heads": ((2, 1), (3, 3))}
RAGGED_FACTORS = {
    "num_splits": NUM_SPLITS,
    "lengths": (((1, 1, 1), (7, 600, 64)), ((70, 0, 130, 3), (200, 40, 0, 300))),
    "rows": (("packed", "packed"), ("slack", "slack"), ("dense", "packed")),
    "heads": ((1, 1), (2, 1)),
    "num_ctas": (None, 3),
}
# One kernel each: of a mask that hides nothing, with sinks and a window, of FP8, of ragged lengths.
FULL = Case()
LOCAL = Case("fp16", 104, 120, window=(90, 20), sink="fp32")
FP8 = Fp8Case(causal=True, scales=("128", "64", "128"), shifted=True, sink="fp32")
RAGGED = RaggedCase((), (), causal=True)
RAGGED_FP8 = RaggedCase((70, 0, 130, 3), (330, 40, 0, 200), "slack", h_k=1)


def _covering(case, factors) -> list:
    cases = []
    for row in pairwise(factors, seed=1):
        (s_q, s_k), (h_q, h_k) = row.pop("lengths"), row.pop("heads")
        cases.append(replace(case, s_q=s_q, s_k=s_k, h_q=h_q, h_k=h_k, **row))
    return cases


def _ragged() -> list[RaggedCase]:
    cases = []
    for row in pairwise(RAGGED_FACTORS, seed=1):
        (lengths_q, lengths_k), (rows_q, rows_k) = row.pop("lengths"), row.pop("rows")
        h_q, h_k = row.pop("heads")
        more = {"rows_q": rows_q, "rows_k": rows_k, "h_q": h_q, "h_k": h_k, **row}
        cases.append(replace(RAGGED, lengths_q=lengths_q, lengths_k=lengths_k, **more))
    return cases


@pytest.mark.parametrize(
    "case", [*_covering(FULL, FACTORS), *_covering(LOCAL, LOCAL_FACTORS)], ids=str
)
def test_accuracy(case, device):
    test_forward._check(case, device)


@pytest.mark.parametrize("case", _covering(FP8, FP8_FACTORS), ids=str)
def test_accuracy_of_fp8(case, device):
    test_fp8._check(case, device)


@pytest.mark.parametrize("case", _ragged(), ids=str)
def test_accuracy_of_ragged_lengths(case, device):
    test_ragged._check(case, device)


@pytest.mark.parametrize("num_splits", [5])
def test_ragged_fp8_is_what_it_is_without_splits(num_splits, device):
    """Of the same scales and shifts, but that rows of P are rounded beside other maxima."""
    call = test_ragged_fp8.Call(RAGGED_FP8, ("128", "64", "128"), device)
    wanted = call()
    call.case = replace(RAGGED_FP8, num_splits=num_splits)
    given, count = call(), len(RAGGED_FP8.lengths_q)
    assert any(not torch.equal(x, y) for x, y in zip(given, wanted, strict=True))
    for i, (x, y) in enumerate(zip(given, wanted, strict=True)):
        is_out = i < count
        assert torch.equal(x.isfinite(), y.isfinite())
        assert torch.allclose(x.float(), y.float(), rtol=0.0, atol=0.1 if is_out else 2.0**-4)


@pytest.mark.parametrize("pages", [16, 1])
def test_a_cache_in_pages(pages, device):
    """Slots of pages that no key has hold NaN, entries of the table beyond the last key -1."""
    call = Call(CacheCase(lengths=(500, 37), h_k=1, pages=pages), device)
    given = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments(), num_splits=5)
    for (out, lse), qkv in zip(call.parts(*given), call.expected(), strict=True):
        exact, exact_lse, baseline = call.exact_and_baseline(*qkv)
        assert_accurate("out", out, exact, baseline)
        assert_lse("lse", lse, exact_lse)


@pytest.mark.parametrize("num_splits", [2, 7])
def test_the_others_in_the_batch_do_not_change_the_bits(num_splits, device):
    """Whatever their lengths are, how many they are and how they lie."""
    case = replace(RAGGED, lengths_q=(1, 70, 5), lengths_k=(260, 400, 64), h_q=1, h_k=1)
    case = replace(case, num_splits=num_splits)
    tensors = case.inputs(device)
    outs, lses = test_ragged._parts(case, *test_ragged._attention(case, tensors, device))
    each = case.queries, case.keys, case.keys
    cut = (rows.each(x.values) for rows, x in zip(each, tensors, strict=True))
    for i, (q, k, v) in enumerate(zip(*cut, strict=True)):
        for lengths_q, lengths_k in (((), ()), ((130, 1), (700, 9))):
            company = replace(
                case,
                lengths_q=(case.lengths_q[i], *lengths_q),
                lengths_k=(case.lengths_k[i], *lengths_k),
                rows_k="slack",
            )
            others = company.inputs(device)
            sides = company.queries, company.keys, company.keys
            for side, x, own in zip(sides, others, (q, k, v), strict=True):
                next(side.each(x.tensor)).copy_(own)
            given = test_ragged._parts(company, *test_ragged._attention(company, others, device))
            assert torch.equal(given[0][0], outs[i])
            assert torch.equal(given[1][0], lses[i])


# More splits than blocks in some of the tiles.
SCHEDULED = replace(LOCAL, s_q=200, s_k=300, h_q=1, h_k=1, num_splits=3, num_ctas=2)
SCHEDULED_FP8 = replace(FP8, s_q=140, s_k=300, h_q=1, h_k=1, num_splits=3, num_ctas=2)
SCHEDULED_RAGGED = replace(
    RAGGED, lengths_q=(150, 0, 1), lengths_k=(300, 40, 0), h_q=1, h_k=1, num_splits=3, num_ctas=2
)


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
@pytest.mark.parametrize("case", [SCHEDULED, SCHEDULED_FP8, SCHEDULED_RAGGED], ids=str)
def test_splits_are_the_same_under_every_schedule(case, device):
    if isinstance(case, RaggedCase):
        tensors = case.inputs(device)

        def attention():
            outs, lses = test_ragged._parts(case, *test_ragged._attention(case, tensors, device))
            return outs + lses

    elif isinstance(case, Fp8Case):
        inputs, descales = [x.tensor for x in case.inputs(device)], case.descales(device)
        sink = case.learnable_sink(device)

        def attention():
            return test_fp8._call(case, *inputs, descales, sink=sink)

    else:
        inputs, sink = [x.tensor for x in make_inputs(case, device)], case.learnable_sink(device)

        def attention():
            return test_forward._attention(case, *inputs, device, sink=sink)

    emulator.compare_schedules(attention, SEEDS, checks=emulator.ALL_CHECKS)


def test_an_infinite_sink_and_queries_without_a_key(device):
    """Only a head's first split has the sink, also where no split sees a key."""
    case = replace(LOCAL, s_q=300, s_k=100, window=(10, 0), num_splits=2)
    q, k, v = (x.values for x in make_inputs(case, device))
    sink = torch.tensor([math.inf, 2.0], device=device)
    out, lse = test_forward._attention(case, q, k, v, device, sink=sink)
    assert torch.equal(lse[:, 0], torch.full_like(lse[:, 0], math.inf))
    assert (out[:, :, 0] == 0.0).all()
    assert (out[:, :190, 1] == 0.0).all() and (lse[:, 1, :190] == 2.0).all()


def test_a_split_call_trains(device):
    """The backward pass reads out and lse alone."""
    case = replace(FULL, h_q=1, h_k=1, s_q=70, s_k=200)
    inputs = [x.values for x in make_inputs(case, device)]
    gradients = []
    for num_splits in (1, 3):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = fa3.flash_attn_func(*leaves, num_splits=num_splits)
        out.backward(torch.ones_like(out))
        gradients.append([x.grad for x in leaves])
    for wanted, given in zip(*gradients, strict=True):
        assert torch.allclose(given.float(), wanted.float(), rtol=2.0**-6, atol=2.0**-6)


def test_operators_take_splits(device):
    q, k, v = (x.values for x in make_inputs(replace(FULL, s_k=300), device))
    wanted, wanted_lse = fa3.flash_attn_func(q, k, v, num_splits=3, return_attn_probs=True)
    out, lse = torch.ops.fa3.forward(q, k, v, num_splits=3)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    target = torch.empty_like(out)
    torch.ops.fa3.forward_out(q, k, v, target, num_splits=3)
    assert torch.equal(target, wanted)


def test_splits_without_a_kernel(plain_torch):
    q, k, v = (x.values for x in make_inputs(FULL, torch.device("cpu")))
    wanted = fa3.flash_attn_func(q, k, v)
    for num_splits in NUM_SPLITS:
        assert torch.equal(fa3.flash_attn_func(q, k, v, num_splits=num_splits), wanted)


@pytest.mark.parametrize(
    ("tiles", "blocks", "ctas", "wanted"),
    [
        (132, 1000, 132, 1),  # every CTA has a tile
        (0, 10, 132, 1),
        (8, 1, 132, 1),
        (8, 4, 132, 1),  # a few blocks are over before partial results are combined
        (1, 1000, 132, 100),  # 10 blocks each; 132 splits would have 8
        (8, 256, 132, 14),  # 112 tiles of 19 blocks; 16 splits would have 16
        (64, 256, 132, 2),  # a wave of 128 tiles
        (100, 256, 132, 5),  # four waves of a fifth each
        (115, 256, 132, 1),  # few CTAs are without a tile
    ],
)
def test_choice(tiles, blocks, ctas, wanted):
    assert splits.choose(tiles, blocks, ctas) == wanted


def test_choice_is_about_as_good_as_any():
    def cost(tiles, blocks, n):
        waves = -(-tiles * n // 132)
        return waves * (2 * -(-blocks // n) + 3) + (8 if n > 1 else 0)

    for tiles in (1, 2, 5, 16, 33, 64, 100, 131):
        for blocks in (1, 3, 10, 64, 1000):
            chosen = splits.choose(tiles, blocks, 132)
            costs = [cost(tiles, blocks, n) for n in range(1, 133)]
            assert 0.85 * costs[chosen - 1] <= min(costs[:blocks])
            assert all(0.85 * x > min(costs[:blocks]) for x in costs[: chosen - 1])


def test_a_long_decode_step_fills_the_machine(device, monkeypatch):
    """num_splits=0 at batch 1: a tile per head, but nearly as many CTAs as SMs."""
    asked = []
    of = splits.of
    monkeypatch.setattr(splits, "of", lambda *x: asked.append(of(*x)) or 1)
    q = torch.empty(1, 1, 8, 64, device=device).bfloat16()
    k = torch.empty(1, 32768, 1, 64, device=device).bfloat16()
    monkeypatch.setattr(fa3.ops.jit, "compile", lambda *x: lambda *arguments: None)
    fa3.ops.plan_of.cache_clear()
    fa3.flash_attn_func(q, k, k, num_splits=0)
    fa3.ops.plan_of.cache_clear()
    assert asked == [14]


def test_ampere_has_no_splits(monkeypatch):
    """The argument is accepted, and the kernel is the one that it has without."""
    target = dispatch.Target("gpu", "A100", (8, 0), 108, "sm_80")
    monkeypatch.setattr(dispatch, "target_of", lambda device: target)
    asked = []
    monkeypatch.setattr(
        fa3.ops.jit, "compile", lambda _, signature, *x: asked.append(signature) or (lambda *_: 0)
    )
    fa3.ops.plan_of.cache_clear()
    q, k = torch.zeros(1, 1, 2, 64).bfloat16(), torch.zeros(1, 4096, 2, 64).bfloat16()
    for num_splits in (0, 3):
        fa3.flash_attn_func(q, k, k, num_splits=num_splits)
    fa3.ops.plan_of.cache_clear()
    assert [signature.is_split for signature in asked] == [False, False]


# The kernel that combines, alone.


def _partial(*shape, empty=0.0, device="cpu"):
    """Of shape (n, b, s, h, dv); that part `empty` of them has no key, and NaN for a result."""
    parts, lse = torch.randn(shape), 3.0 * torch.randn(shape[:-1])
    is_empty = torch.rand(lse.shape) < empty
    parts[is_empty] = math.nan
    lse[is_empty] = -math.inf
    return parts.to(device), lse.to(device)


def _combined(parts, part_lse):
    """In fp64, and in fp32 as torch would."""
    results = []
    for dtype in (torch.float64, torch.float32):
        x, y = parts.to(dtype), part_lse.to(dtype)
        lse = torch.logsumexp(y, dim=0)
        share = (y - lse).exp().masked_fill(y == -math.inf, 0.0)
        values = x.masked_fill((y == -math.inf)[..., None], 0.0)
        results.append(((share[..., None] * values).sum(dim=0), lse))
    return results


@pytest.mark.parametrize(
    ("shape", "empty", "out_dtype"),
    [
        ((1, 2, 3, 4, 64), 0.0, torch.bfloat16),
        ((2, 1, 7, 3, 8), 0.3, torch.bfloat16),
        ((7, 2, 5, 1, 12), 0.7, torch.float16),
        ((33, 1, 2, 5, 256), 0.5, None),
        ((4, 3, 1, 5, 4), 1.0, torch.bfloat16),
        ((3, 1, 150, 1, 4), 0.2, None),  # several rows per CTA
    ],
    ids=str,
)
def test_combine(shape, empty, out_dtype, device):
    parts, part_lse = _partial(*shape, empty=empty, device=device)
    out, lse = fa3.flash_attn_combine(parts, part_lse, out_dtype=out_dtype)
    (exact, exact_lse), (baseline, _) = _combined(parts, part_lse)
    dtype = out_dtype or torch.float32
    assert_accurate("out", out, exact.to(dtype), baseline.to(dtype))
    assert lse.stride(1) == 1
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    assert torch.allclose(lse.double(), exact_lse, rtol=2.0**-21, atol=2.0**-21)
    again, _ = fa3.flash_attn_combine(parts, part_lse, out_dtype=out_dtype)
    assert torch.equal(again, out)


def test_combine_reads_and_writes_any_strides(device):
    parts, part_lse = _partial(3, 2, 5, 4, 16, empty=0.2, device=device)
    wanted, wanted_lse = fa3.flash_attn_combine(parts, part_lse, out_dtype=torch.bfloat16)
    inner = [Bordered(x, "packed") for x in parts.unbind()]
    stacked = torch.stack([x.memory for x in inner])
    strides = stacked.stride(0), *inner[0].tensor.stride()
    strided = stacked.as_strided(parts.shape, strides, inner[0].tensor.storage_offset())
    out = Bordered(torch.zeros_like(wanted), "packed")
    lse = part_lse.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    given, given_lse = fa3.flash_attn_combine(strided, lse, out.tensor)
    assert given is out.tensor
    assert torch.equal(given, wanted) and torch.equal(given_lse, wanted_lse)
    out.assert_border_untouched("out")
    odd = torch.empty(parts.numel() + 1, device=device)[1:].view(parts.shape).copy_(parts)
    assert torch.equal(fa3.flash_attn_combine(odd, part_lse)[0].bfloat16(), wanted)


def test_combine_of_infinite_sums(device):
    """One part's lse is inf, as beside an infinite sink: it alone counts."""
    parts, part_lse = _partial(3, 1, 2, 1, 4, device=device)
    part_lse[1] = math.inf
    out, lse = fa3.flash_attn_combine(parts, part_lse)
    assert torch.equal(out, parts[1])
    assert (lse == math.inf).all()


def test_combine_on_the_host(plain_torch):
    parts, part_lse = _partial(5, 2, 3, 4, 20, empty=0.5)
    (exact, exact_lse), _ = _combined(parts, part_lse)
    out, lse = fa3.flash_attn_combine(parts, part_lse)
    assert torch.allclose(out.double(), exact, rtol=0.0, atol=1e-6)
    assert torch.allclose(lse.double(), exact_lse, rtol=0.0, atol=1e-5)


def test_combine_as_an_operator(plain_torch):
    parts, part_lse = _partial(3, 2, 3, 4, 8)
    for x in (parts, part_lse):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.fa3.combine.default, (parts, part_lse, torch.bfloat16))
    out = torch.empty(2, 3, 4, 8)
    torch.library.opcheck(
        torch.ops.fa3.combine_out.default, (parts.detach(), part_lse.detach(), out)
    )
    meta = fa3.flash_attn_combine(parts.detach().to("meta"), part_lse.detach().to("meta"))
    assert [x.shape for x in meta] == [(2, 3, 4, 8), (2, 3, 4)]


def test_gradients_of_combine(plain_torch):
    """Of both arguments, through both results; an empty part gets none, whatever its out is."""
    parts, part_lse = _partial(4, 2, 3, 2, 8, empty=0.3)
    dout, dlse = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2)
    part_lse[0] = 0.5  # no row is without a key
    parts[0] = 1.0
    gradients = []
    for double in (False, True):
        leaves = [(x.double() if double else x.clone()).requires_grad_() for x in (parts, part_lse)]
        results = _combined(*leaves)[0] if double else fa3.flash_attn_combine(*leaves)
        torch.autograd.backward(results, [x.to(results[0].dtype) for x in (dout, dlse)])
        gradients.append([x.grad for x in leaves])
    for given, wanted in zip(*gradients, strict=True):
        assert torch.allclose(given.double(), wanted.nan_to_num(0.0), rtol=1e-5, atol=1e-5)


def test_vmap_of_combine(plain_torch):
    parts, part_lse = (x.unflatten(1, (3, 2)) for x in _partial(4, 6, 3, 2, 8))
    given = torch.vmap(fa3.flash_attn_combine, (1, 1))(parts, part_lse)
    for i in range(3):
        wanted = fa3.flash_attn_combine(parts[:, i], part_lse[:, i])
        assert all(torch.equal(x[i], y) for x, y in zip(given, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"out_partial": torch.zeros(2, 1, 3, 4, 8).half()}, TypeError, "out_partial.*float16"),
        ({"out_partial": torch.zeros(1, 3, 4, 8)}, ValueError, r"out_partial.*\(1, 3, 4, 8\)"),
        ({"out_partial": torch.zeros(2, 1, 3, 4, 6)}, ValueError, "out_partial.* 6.*of 4"),
        ({"out_partial": torch.zeros(0, 1, 3, 4, 8)}, ValueError, "out_partial.*num_splits"),
        ({"lse_partial": torch.zeros(2, 1, 4, 3)}, ValueError, r"lse_partial.*\(2, 1, 3, 4\)"),
        ({"lse_partial": torch.zeros(2, 1, 3, 4).double()}, ValueError, "lse_partial.*float64"),
        ({"lse_partial": None}, TypeError, "lse_partial is a NoneType"),
        ({"out_dtype": torch.float64}, ValueError, "out_dtype is torch.float64"),
        ({"out": torch.zeros(1, 3, 4, 12)}, ValueError, r"out .*12.*\(1, 3, 4, 8\)"),
        ({"out": torch.zeros(1, 3, 4, 8).int()}, ValueError, "out .*int32"),
        ({"out": torch.zeros(1, 3, 4, 9)[..., :8]}, ValueError, "out .*stride 9.* 4"),
        (
            {"out": torch.zeros(1, 3, 4, 8), "out_dtype": torch.float16},
            ValueError,
            "out_dtype is torch.float16.*float32",
        ),
    ],
    ids=str,
)
def test_what_combine_refuses(change, error, words, plain_torch):
    given = {"out_partial": torch.zeros(2, 1, 3, 4, 8), "lse_partial": torch.zeros(2, 1, 3, 4)}
    with pytest.raises(error, match=words):
        fa3.flash_attn_combine(**given | change)


def test_combine_does_not_write_where_gradients_are_asked_for(plain_torch):
    parts, part_lse = _partial(2, 1, 3, 4, 8)
    with pytest.raises(NotImplementedError, match="out is a tensor.*out_dtype"):
        fa3.flash_attn_combine(parts.requires_grad_(), part_lse, torch.zeros(1, 3, 4, 8))
