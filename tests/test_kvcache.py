"""flash_attn_with_kvcache: accuracy, what is written to caches, and what is never read."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

import fa3
from fa3 import append, emulator
from fa3.call import lengths
from fa3.emulator.memory.bulk import swizzled_chunks
from fa3.inspect.cli import inspect
from fa3.kernels.signature import Signature
from fa3.kernels.sm90.rows import CHUNK, COLUMNS, ROWS, RowLayout
from fa3.launch import jit, tuning
from fa3.reference.append import codes, rotated

from .accuracy import assert_accurate, assert_lse
from .cache_cases import GATHERED, CacheCase, Call, bits, covering
from .cases import Bordered
from .conftest import HOPPER

E4M3 = torch.float8_e4m3fn


def _check(case: CacheCase, device) -> None:
    call = Call(case, device)
    out, lse = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
    for (given, given_lse), qkv in zip(call.parts(out, lse), call.expected(), strict=True):
        exact, exact_lse, baseline = call.exact_and_baseline(*qkv)
        assert_accurate("out", given, exact, baseline)
        assert_lse("lse", given_lse, exact_lse)
    _check_caches(call)


def _check_caches(call: Call) -> None:
    """New rows are where they belong, and nothing else was written."""
    keys, values = zip(*((k[0], v[0]) for _, k, v in call.stored()), strict=True)
    for cache, rows in ((call.k_cache, keys), (call.v_cache, values)):
        wanted = cache.values.clone()
        for (page, row), x in zip(call.places, rows, strict=True):
            bits(wanted)[page, row] = bits(x)
        assert torch.equal(bits(cache.tensor), bits(wanted))
        cache.assert_border_untouched("cache")


@pytest.mark.parametrize(
    "case",
    [
        CacheCase(),
        CacheCase(pages=1),
        CacheCase(pages=5, num_new=2),
        CacheCase(pages=0, num_new=2),
        CacheCase(pages=-1, num_new=3, rotary="halves"),
        CacheCase(num_queries=(1, 70), num_new=1, rotary="interleaved"),
    ],
    ids=str,
)
def test_first_light(case, device):
    _check(case, device)


@pytest.mark.parametrize("case", covering() + covering(GATHERED), ids=str)
def test_accuracy(case, device):
    _check(case, device)


LEFTPAD = [
    CacheCase(pages=0, num_new=2, leftpad=(150, 37), rotary="halves"),
    CacheCase(pages=-1, num_queries=(1, 1), leftpad=(0, 20)),
    CacheCase(pages=5, num_new=1, leftpad=(64, 3), rotary="interleaved"),
    CacheCase(pages=16, num_queries=(1, 70), leftpad=(70, 37)),
]


@pytest.mark.parametrize("case", LEFTPAD, ids=str)
def test_first_rows_that_do_not_count(case, device):
    """They hold NaN. Positions of rotary embeddings are those of rows."""
    _check(case, device)


@pytest.mark.parametrize("case", LEFTPAD[::2], ids=str)
def test_first_rows_that_do_not_count_in_plain_torch(case, plain_torch):
    append._run_of.cache_clear()
    _check(case, torch.device("cpu"))
    append._run_of.cache_clear()


@pytest.mark.parametrize("case", covering()[::5] + covering(GATHERED)[::5], ids=str)
def test_plain_torch(case, plain_torch):
    append._run_of.cache_clear()
    _check(case, torch.device("cpu"))
    append._run_of.cache_clear()


@pytest.mark.parametrize("pages", [48, 5])
def test_keys_in_pages_are_attended_to_as_if_in_rows(pages, device):
    """Bit by bit, where both have the same blocks."""
    call = Call(CacheCase(pages=pages), device)
    out, _ = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
    for given, (q, k, v) in zip(out.split(1), call.expected(), strict=True):
        assert torch.equal(given, fa3.flash_attn_func(q, k, v, causal=True))


def test_batch_indices_look_rows_of_the_table_up(device):
    call = Call(CacheCase(num_new=2), device)
    given = call.arguments()
    wanted, _ = fa3.flash_attn_with_kvcache(call.queries(), **given)
    other = torch.full_like(call.table[:1], -1)
    given["page_table"] = torch.cat([call.table[1:], other, call.table[:1]])
    given["cache_batch_idx"] = torch.tensor([2, 0], dtype=torch.int32, device=device)
    call._place()
    out, _ = fa3.flash_attn_with_kvcache(call.queries(), **given)
    assert torch.equal(out, wanted)


def test_varlen_func_takes_pages(device):
    call = Call(CacheCase(num_queries=(1, 70)), device)
    wanted, wanted_lse = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
    given = call.arguments()
    out, lse = fa3.flash_attn_varlen_func(
        call.queries(),
        call.k_cache.tensor,
        call.v_cache.tensor,
        given["cu_seqlens_q"],
        None,
        70,
        None,
        seqused_k=call.seqlens,
        page_table=call.table,
        causal=True,
        return_attn_probs=True,
    )
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


@pytest.mark.parametrize(
    "case",
    [
        CacheCase(num_queries=(1, 1), h_q=6),
        CacheCase(num_queries=(1, 1), h_q=6, window=(50, 0)),
        CacheCase(num_queries=(4, 4), h_q=6, window=(torch.tensor(9), -1)),
        CacheCase(num_queries=(4, 4), h_q=6, h_k=1),
        CacheCase(num_queries=(1, 70), pages=48),
        CacheCase(num_queries=(30, 50), h_q=16, lengths=(20, 200)),  # queries that see no key
    ],
    ids=str,
)
def test_heads_of_a_group_share_a_tile(case, device):
    """The bits do not tell."""
    call = Call(case, device)
    packed, lse = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments(), pack_gqa=True)
    apart, its_lse = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments(), pack_gqa=False)
    assert packed.shape == apart.shape and packed.is_contiguous() and torch.equal(packed, apart)
    assert torch.equal(lse, its_lse) and lse.is_contiguous()
    out = Bordered(torch.zeros_like(apart)[None] if case.is_packed else apart * 0, "packed")
    target = out.tensor[0] if case.is_packed else out.tensor
    fa3.flash_attn_with_kvcache(call.queries(), **call.arguments(), pack_gqa=True, out=target)
    assert torch.equal(target, apart)
    out.assert_border_untouched("out")


def test_out(device):
    call = Call(CacheCase(num_queries=(1, 1)), device)
    wanted, _ = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
    out = Bordered(torch.zeros_like(wanted), "packed")
    given, _ = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments(), out=out.tensor)
    assert given is out.tensor and torch.equal(given, wanted)
    out.assert_border_untouched("out")


def _one_byte(pages: int, device) -> tuple:
    """Attention to one-byte caches, and to the same keys in rows: two functions.

    With a scale per head, and one per 64 keys of a sequence, whatever pages they are in.
    """
    case = CacheCase((200, 37), (4, 4), pages=pages, head_dim=96, head_dim_v=96)
    call = Call(case, device)
    inputs = [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (call.k, call.v)]
    q, k, v, q_descale, k_descale, v_descale, *_ = fa3.quantize_fp8(
        call.queries(), *inputs, rows_per_block=64
    )
    blocks = -(-call.table.shape[1] * pages // 64)

    def cache(x):
        rows = x.new_zeros(*call.k_cache.values.shape[:2], *x.shape[2:]).view(torch.uint8)
        for i, (page, row) in enumerate(call.places):
            rows[page, row] = x.view(torch.uint8)[i, : len(page)]
        return rows.view(x.dtype)

    def scales(x):
        return torch.nn.functional.pad(x, (0, blocks - x.shape[-1]), value=torch.nan)

    used = {"seqused_k": call.seqlens, "causal": True}
    in_rows = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    in_pages = in_rows | {"k_descale": scales(k_descale), "v_descale": scales(v_descale)}
    in_pages["page_table"] = call.table
    pairs = ((k, v), in_rows), ((cache(k), cache(v)), in_pages)

    def attention(kv, more):
        return fa3.flash_attn_varlen_func(q, *kv, *(None,) * 4, **used, **more)

    paged, plain = (functools.partial(attention, *pair) for pair in reversed(pairs))
    return paged, plain


@pytest.mark.parametrize("pages", [64, 5])
def test_one_byte_caches(pages, device):
    paged, plain = _one_byte(pages, device)
    assert torch.equal(paged(), plain())


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
def test_one_byte_caches_are_the_same_under_every_schedule(device):
    paged, _ = _one_byte(5, device)
    emulator.compare_schedules(lambda: [paged()], range(2), checks=emulator.ALL_CHECKS)


@pytest.mark.parametrize("kind", ["halves", "interleaved"])
def test_codes_are_rotated_as_numbers(kind, device):
    """24 pairs of columns: a chunk of 16 codes would be in both halves of them."""
    q, k, v = (torch.randn(2, 5, 2, 64).to(E4M3).to(device) for _ in "qkv")
    angles = torch.randn(40, 24).to(device)
    cos, sin = angles.cos().to(E4M3), angles.sin().to(E4M3)
    seqlens, table = (
        torch.tensor([9, 30]).int().to(device),
        torch.arange(2).int().to(device)[:, None],
    )
    k[0, 0, 0, :2], cos[9, 0], sin[9, 0] = 448, 1, -1  # 896, which no code reaches
    caches = [torch.zeros(2, 48, 2, 64, device=device).to(E4M3) for _ in "kv"]
    more = table, seqlens, None, cos, sin, None, kind == "interleaved"
    append.append(k, v, *caches, *more)
    turned = append.rotate(q, cos, sin, seqlens, None, kind == "interleaved")
    for i, first in enumerate(seqlens.tolist()):
        rows = slice(first, first + 5)
        for given, x in ((turned[i], q[i]), (caches[0][i, rows], k[i])):
            wanted = codes(rotated(x.float(), cos[rows], sin[rows], kind))
            assert torch.equal(bits(given), bits(wanted))
        assert torch.equal(bits(caches[1][i, rows]), bits(v[i]))
        assert not caches[0][i, :first].float().any()


def test_new_rows_beside_one_byte_queries(plain_torch):
    """In 16 bits they are narrowed, in those of the cache stored as they are: the same codes."""
    append._run_of.cache_clear()
    call = Call(CacheCase(num_new=3, cache="e4m3"), torch.device("cpu"))
    q, results = call.queries().to(E4M3), []
    for x in (call.new_k, call.new_v):
        x.copy_(x.to(E4M3))
    call.descales["k_descale"].fill_(1.0), call.descales["v_descale"].fill_(1.0)
    for given in (call.arguments(), call.arguments()):
        if results:
            given |= {name: given[name].to(E4M3) for name in ("k", "v")}
        out, _ = fa3.flash_attn_with_kvcache(q, **given)
        results.append((out, bits(call.k_cache.tensor).clone(), bits(call.v_cache.tensor).clone()))
    append._run_of.cache_clear()
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_what_is_not_e4m3_is_not_rotated(plain_torch):
    q = torch.zeros(1, 1, 2, 64).to(torch.int8)
    k_cache, v_cache = torch.zeros(1, 8, 2, 64).to(torch.int8), torch.zeros(1, 8, 2, 64).to(E4M3)
    angles = dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(8, 16))
    with pytest.raises(ValueError, match=r"rotary_cos .*int8.*before they are quantised"):
        fa3.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=3, **angles)


SCHEDULED = CacheCase(num_queries=(1, 70), num_new=3, rotary="halves", lengths=(300, 60))


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
@pytest.mark.parametrize("pages", [16, 5])
def test_caches_are_the_same_under_every_schedule(pages, device):
    call = Call(replace(SCHEDULED, pages=pages), device)

    def attention():
        out, lse = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
        return out, lse

    emulator.compare_schedules(attention, range(2), checks=emulator.ALL_CHECKS)
    _check_caches(call)


@pytest.mark.parametrize("pages", [16, 5])
def test_pages_that_do_not_exist_hold_zeros(pages, device, monkeypatch):
    """The host cannot know of them on a GPU. Nothing outside of the pages is read or written."""
    monkeypatch.setattr(lengths, "check_values", lambda *arguments, **options: None)
    call = Call(CacheCase(num_new=2, lengths=(100, 40), pages=pages), device)
    for i, page in enumerate((-1, 10**6, -(2**31), 2**31 - 1)):
        call.table[0, i] = page
    call.table[1, 40 // pages] = 10**6  # where its new rows belong
    out, _ = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
    _, k, v = next(call.expected())
    k[:, : 4 * pages], v[:, : 4 * pages] = 0, 0
    q = call.q[0][None]
    torch.testing.assert_close(out[:1], fa3.flash_attn_func(q, k, v, causal=True))
    assert out.isfinite().all()
    for cache in (call.k_cache, call.v_cache):
        cache.assert_border_untouched("cache")


def test_rows_that_do_not_fit_are_dropped(device):
    """And so are those of sequences whose pages have run out."""
    call = Call(CacheCase(num_new=5, lengths=(60, 14)), device)
    before = call.k_cache.tensor.clone()
    table = call.table[:, :1].contiguous()
    append.append(
        call.new_k, call.new_v, call.k_cache.tensor, call.v_cache.tensor, table, call.seqlens
    )
    page, row = call.places[1]
    before[page[14:16], row[14:16]] = call.new_k[1, :2]
    bits = torch.int16
    assert torch.equal(call.k_cache.tensor.view(bits), before.view(bits))


def test_other_lengths_and_tables_need_no_other_kernel(device, monkeypatch):
    _check(CacheCase(num_new=1), device)
    monkeypatch.setattr(jit, "_build", None)
    monkeypatch.setattr(jit, "_load", None)
    _check(CacheCase(num_new=4, lengths=(5, 0, 129), num_queries=(2, 2, 2), pages=48), device)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"page_table": torch.zeros(3, 4).int()}, ValueError, ["page_table has batch 3", "2"]),
        ({"page_table": torch.zeros(2, 4)}, TypeError, ["page_table has dtype", "torch.int32"]),
        ({"page_table": torch.zeros(2).int()}, ValueError, ["page_table has shape (2,)", "pages"]),
        ({"cache_batch_idx": torch.zeros(3).int()}, ValueError, ["cache_batch_idx", "(3,)"]),
        ({"cache_seqlens": torch.tensor([5, 9])}, ValueError, ["cache_seqlens", "torch.int32"]),
        ({"cache_seqlens": torch.tensor([5]).int()}, ValueError, ["cache_seqlens", "(1,)", "(2,)"]),
        ({"cache_seqlens": torch.tensor([5, 99]).int()}, ValueError, ["[1]", "99", "64"]),
        ({"page_table": torch.full((2, 4), 9).int()}, ValueError, ["page_table[0, 0]", "9", "7"]),
        ({"k": torch.zeros(2, 1, 2, 64).bfloat16()}, ValueError, ["v is None"]),
        ({"rotary_cos": torch.zeros(9, 16)}, ValueError, ["rotary_sin is None"]),
        ({"cache_leftpad": torch.zeros(3).int()}, ValueError, ["cache_leftpad", "(3,)", "(2,)"]),
        (
            {"cache_leftpad": torch.tensor([5, 10]).int()},
            ValueError,
            ["cache_leftpad[1]", "10", "9"],
        ),
        ({"cache_leftpad": torch.tensor([-1, 0]).int()}, ValueError, ["cache_leftpad[0]", "-1"]),
        ({"k_cache": torch.zeros(8, 12, 2, 64).bfloat16()}, ValueError, ["keys per page", "12"]),
        (
            dict.fromkeys(("v_cache", "k_cache"), torch.zeros(8, 0, 2, 64).bfloat16())
            | {"cache_seqlens": None},
            ValueError,
            ["k has 0 keys per page, expected at least 1"],
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input(changes, error, words, device):
    """Nothing is written: the caches stay as they are."""
    k_cache, v_cache = (torch.zeros(8, 16, 2, 64, device=device).bfloat16() for _ in range(2))
    given = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_seqlens": torch.tensor([5, 9], dtype=torch.int32),
        "page_table": torch.arange(8).int().view(2, 4),
    } | changes
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    with pytest.raises(error) as caught:
        fa3.flash_attn_with_kvcache(
            torch.zeros(2, 1, 2, 64, device=device).bfloat16(), **given, check_pages=True
        )
    for word in words:
        assert word in str(caught.value)
    assert (k_cache == 0).all() and (v_cache == 0).all()


def test_rows_beyond_the_cache_are_refused_where_the_host_knows(device):
    call = Call(CacheCase(num_new=2, lengths=(100, 40)), device)
    given = call.arguments()
    given["page_table"] = given["page_table"][:, :3]
    before = call.k_cache.tensor.clone()
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\] is 100 and k has 2 more"):
        given["cache_seqlens"][1] = 40
        fa3.flash_attn_with_kvcache(call.queries(), **given, check_pages=True)
    assert torch.equal(call.k_cache.tensor.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("name", ["q", "k_cache", "v"])
def test_caches_have_no_backward_pass(name, plain_torch):
    """Which is said before they are written."""
    x = torch.zeros(1, 1, 2, 64).bfloat16()
    seqlens = torch.tensor([3], dtype=torch.int32)
    given = {"q": x, "k_cache": torch.zeros(1, 8, 2, 64).bfloat16(), "k": x + 1, "v": x + 1}
    given |= {"v_cache": given["k_cache"].clone(), "cache_seqlens": seqlens}
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} has requires_grad=True"):
        fa3.flash_attn_with_kvcache(**given)
    assert (given["v_cache"] == 0).all()
    with torch.no_grad():
        fa3.flash_attn_with_kvcache(**given)
    assert (given["v_cache"][:, 3] == 1).all()


@pytest.mark.parametrize("operator", ["append", "rotate"])
def test_opcheck(operator, device):
    call = Call(CacheCase(num_new=2), device)
    angles = call.cos, call.sin
    caches = call.k_cache.values.nan_to_num(), call.v_cache.values.nan_to_num()
    if operator == "append":
        given = call.new_k, call.new_v, *caches, call.table, call.seqlens, None, *angles
        torch.library.opcheck(torch.ops.fa3.append.default, given)
    else:
        given = call.queries(), *angles, call.seqlens
        torch.library.opcheck(torch.ops.fa3.rotate.default, given)


def test_compile_without_graph_breaks(device):
    call = Call(CacheCase(num_new=2, rotary="halves"), device)
    wanted, _ = fa3.flash_attn_with_kvcache(call.queries(), **call.arguments())
    compiled = torch.compile(fa3.flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    call._place()
    out, _ = compiled(call.queries(), **call.arguments())
    assert torch.equal(out, wanted)
    _check_caches(call)


def _paged(dtype: str, dims: tuple[int, int], mask: str, page_rows: int) -> Signature:
    return Signature(dtype, *dims, mask, is_ragged=True, page_rows=page_rows)


# Kernels that the accuracy tests run, but for tiles of 256.
LEAN = [
    _paged("bf16", (64, 64), "causal", 16),
    _paged("bf16", (64, 64), "causal", 1),
    _paged("fp16", (96, 96), "full", 1),
    _paged("bf16", (192, 128), "causal", 64),
    _paged("bf16", (256, 256), "local", 8),
    _paged("bf16", (256, 256), "local", 1),
]


@pytest.mark.parametrize("paged", LEAN, ids=lambda s: f"{s.dtype} {s.head_dim} {s.page_rows}")
def test_lean(paged, device):
    """Nothing spills, and the steady loop is that of keys in rows, but for its tile."""
    reports = [inspect(s).report for s in (paged, replace(paged, page_rows=0))]
    assert reports[0].resources.frame == 0
    slots = [report.steady.straight.per_exponential for report in reports]
    assert slots[0] <= slots[1] + 0.3


@pytest.mark.parametrize("paged", LEAN[1::4], ids=lambda s: f"{s.head_dim} {s.page_rows}")
def test_tiles_for_few_queries_are_lean(paged, device):
    """One warpgroup issues no more than two do, for a score."""
    few, usual = (inspect(paged, tuning.forward(paged, rows=n)).report for n in (1, 99))
    assert few.resources.frame == 0 and few.warnings == ()
    slots = [report.steady.straight.per_exponential for report in (few, usual)]
    assert slots[0] <= slots[1]


@pytest.mark.parametrize("width", [64, 96, 128, 192, 256, 384, 512])
def test_rows_are_gathered_to_where_tma_puts_them(width):
    """A box of each column block, whose chunks the hardware permutes by their addresses."""
    layout = RowLayout(48, width)
    span = layout.span
    for row, chunk in itertools.product(range(layout.rows), range(width // CHUNK)):
        column = chunk * CHUNK
        place = (column // span * layout.rows + row) * span + column % span
        first = layout.first(row % ROWS, chunk % COLUMNS)
        given = layout.later(first, row - row % ROWS, chunk - chunk % COLUMNS)
        assert given == CHUNK * swizzled_chunks(place, CHUNK, span // CHUNK - 1)[0]
