"""flash_attn_varlen_func and flash_attn_qkvpacked_func: arguments, errors, the operator."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fa3
from fa3 import ops

pytestmark = pytest.mark.usefixtures("plain_torch")
LENGTHS_Q, LENGTHS_K = (3, 0, 20), (5, 7, 11)
H_Q, H_K, D = 4, 2, 32
E4M3 = torch.float8_e4m3fn


def _cu(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _call(lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **changes) -> dict:
    """Arguments of flash_attn_varlen_func."""
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    return {
        "q": torch.randn(total_q, H_Q, D).bfloat16(),
        "k": torch.randn(total_k, H_K, D).bfloat16(),
        "v": torch.randn(total_k, H_K, D).bfloat16(),
        "cu_seqlens_q": _cu(lengths_q),
        "cu_seqlens_k": _cu(lengths_k),
        "max_seqlen_q": max(lengths_q, default=0),
        "max_seqlen_k": max(lengths_k, default=0),
    } | changes


def _refused(error, *words, **changes):
    """The call raises `error` with all of `words` in its message, and `out` stays as it was."""
    arguments = _call(**changes)
    out = torch.full((sum(LENGTHS_Q), H_Q, D), 7.0).bfloat16()
    with pytest.raises(error) as caught:
        fa3.flash_attn_varlen_func(**{"out": out} | arguments)
    message = str(caught.value)
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(str(word))}(?!\w)", message), (word, message)
    assert (out == 7.0).all()


@pytest.mark.parametrize("side", ["q", "k"])
def test_lengths_of_the_wrong_kind(side):
    name = f"cu_seqlens_{side}"
    right = _cu(LENGTHS_Q if side == "q" else LENGTHS_K)
    _refused(TypeError, name, torch.int64, torch.int32, **{name: right.long()})
    _refused(TypeError, name, "list", "torch.Tensor", **{name: right.tolist()})
    _refused(ValueError, name, "meta", "cpu", **{name: right.to("meta")})
    _refused(ValueError, name, 2, 3, "batch", **{name: right[:-1]})
    _refused(ValueError, name, "dimension", **{name: right[None]})
    _refused(ValueError, name, "stride", 2, 1, **{name: right.repeat_interleave(2)[::2]})
    _refused(ValueError, name, 0, **{name: right[:0]})
    used = f"seqused_{side}"
    _refused(TypeError, used, torch.int64, torch.int32, **{used: torch.tensor([1, 0, 1])})
    _refused(ValueError, used, 2, 3, **{used: torch.tensor([1, 0]).int()})


def test_longest():
    for side in ("q", "k"):
        name = f"max_seqlen_{side}"
        _refused(ValueError, name, None, f"cu_seqlens_{side}", **{name: None})
        _refused(ValueError, name, -1, 0, **{name: -1})
        _refused(TypeError, name, 2.5, "int", **{name: 2.5})
    _refused(ValueError, "max_seqlen_q", 19, 20, max_seqlen_q=19)
    _refused(ValueError, "max_seqlen_k", 10, 11, max_seqlen_k=10)


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("cu_seqlens_q", [1, 3, 3, 23], ["cu_seqlens_q[0]", 1, 0]),
        ("cu_seqlens_k", [0, 12, 5, 23], ["cu_seqlens_k[2]", 5, 12]),
        ("cu_seqlens_k", [0, 5, 12, 24], ["cu_seqlens_k[-1]", 24, 23]),
        ("seqused_q", [3, 1, 20], ["seqused_q[1]", 1, 0]),
        ("seqused_k", [3, -1, 11], ["seqused_k[1]", -1, 7]),
    ],
)
def test_lengths_that_do_not_fit(name, numbers, words):
    _refused(ValueError, *words, **{name: torch.tensor(numbers).int()})


def test_totals_on_request():
    """More rows than sequences have are right, unless one asks."""
    q = torch.randn(30, H_Q, D).bfloat16()
    fa3.flash_attn_varlen_func(**_call(q=q))
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[-1\] is 23, expected 30, the rows of q"):
        fa3.flash_attn_varlen_func(**_call(q=q), check_lengths=True)
    fa3.flash_attn_varlen_func(**_call(), check_lengths=True)


def test_ranks():
    _refused(ValueError, "q", 4, 3, "cu_seqlens_q", q=torch.zeros(1, 23, H_Q, D).bfloat16())
    _refused(ValueError, "k", 3, 4, "cu_seqlens_k", cu_seqlens_k=None)
    _refused(ValueError, "v", 22, 23, 0, v=torch.zeros(22, H_K, D).bfloat16())
    _refused(ValueError, "k", 3, "cu_seqlens_q", 4, k=torch.zeros(4, 9, H_K, D).bfloat16(),
             v=torch.zeros(4, 9, H_K, D).bfloat16(), cu_seqlens_k=None)  # fmt: skip


def test_out_of_the_wrong_shape():
    _refused(ValueError, "out", out=torch.full((1, 23, H_Q, D), 7.0).bfloat16())


def test_shapes_of_scales():
    q, k, v = (x.to(E4M3) for x in list(_call().values())[:3])
    call = _call(q=q, k=k, v=v)
    out = fa3.flash_attn_varlen_func(**call, k_descale=torch.ones(1, H_K, 23 // 128 + 3))
    assert torch.equal(out, fa3.flash_attn_varlen_func(**call))
    with pytest.raises(
        ValueError, match=r"k_descale has shape \(1, 2, 1\), expected .*\(1, 2, 3\)"
    ):
        fa3.flash_attn_varlen_func(**call, k_descale=torch.ones(1, H_K, 1))


def test_keys_without_rows():
    """No sequence has a key; rows that do not count stay as they are."""
    call = _call((3, 4, 20), (0, 0, 0), seqused_q=torch.tensor([3, 1, 20]).int())
    out = torch.full((27, H_Q, D), 7.0).bfloat16()
    out, lse = fa3.flash_attn_varlen_func(**call, out=out, return_attn_probs=True)
    assert (out[4:7] == 7.0).all()
    counts = [0, 1, 2, 3, *range(7, 27)]
    assert (out[counts] == 0.0).all()
    assert lse[:, counts].isneginf().all()


@pytest.mark.parametrize("more", [2**31 - 1, -(2**31)])
def test_keys_without_rows_and_bad_lengths(more, monkeypatch):
    """The host cannot know them on a GPU: they are cut to the rows that a sequence has."""
    monkeypatch.setattr("fa3.call.lengths.check_values", lambda *arguments, **options: None)
    call = _call((3, 4, 20), (0, 0, 0), seqused_q=torch.tensor([3, more, 20]).int())
    out = torch.full((27, H_Q, D), 7.0).bfloat16()
    out, lse = fa3.flash_attn_varlen_func(**call, out=out, return_attn_probs=True)
    counts = range(27) if more > 0 else [0, 1, 2, *range(7, 27)]
    assert (out[:, 0, 0] == 0.0).nonzero().flatten().tolist() == list(counts)
    assert lse[:, list(counts)].isneginf().all()


def test_no_sequence_at_all():
    call = _call((), ())
    out, lse = fa3.flash_attn_varlen_func(**call, return_attn_probs=True)
    assert (out.shape, lse.shape) == ((0, H_Q, D), (H_Q, 0))


def test_qkvpacked():
    qkv = torch.randn(2, 9, 3, H_Q, D).bfloat16()
    wanted = fa3.flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(qkv, causal=True), wanted)
    grouped = qkv.view(2, 9, 3 * H_Q, D)
    q, k, v = grouped.split([8, 2, 2], dim=2)
    given = fa3.flash_attn_qkvpacked_func(grouped, num_heads_q=8)
    assert torch.equal(given, fa3.flash_attn_func(q, k, v))
    for bad, words in (
        ({"qkv": qkv[:, :, :2]}, "expected 3 in dimension 2"),
        ({"qkv": grouped}, "num_heads_q is None"),
        ({"qkv": grouped, "num_heads_q": 7}, "num_heads_q is 7 but qkv has 12 heads"),
        ({"qkv": grouped[0], "num_heads_q": 8}, r"qkv has shape \(9, 12, 32\)"),
    ):
        with pytest.raises(ValueError, match=words):
            fa3.flash_attn_qkvpacked_func(**bad)


def test_the_operator():
    call = _call(seqused_k=torch.tensor([5, 0, 3]).int())
    wanted, wanted_lse = fa3.flash_attn_varlen_func(**call, causal=True, return_attn_probs=True)
    out, lse = torch.ops.fa3.forward(**call, causal=True)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    q, k, v, *_ = call.values()
    named = {name: x for name, x in call.items() if name not in "qkv"}
    torch.library.opcheck(torch.ops.fa3.forward.default, (q, k, v), named)
    torch.library.opcheck(torch.ops.fa3.forward_out.default, (q, k, v, torch.empty_like(q)), named)


def _model(q, k, v, cu_q, cu_k, longest_q, longest_k):
    return fa3.flash_attn_varlen_func(q * 2, k, v, cu_q, cu_k, longest_q, longest_k, causal=True)


def test_compile_with_dynamic_lengths():
    """One graph serves other lengths, totals and numbers of sequences."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(_model, fullgraph=True, backend=backend, dynamic=True)
    # No two sizes of the first call are equal, or torch takes them for one.
    for lengths in (((3, 0, 20, 1), (5, 7, 11, 6)), ((4, 9), (3, 30)), ((6, 2, 8), (2, 9, 5))):
        given = list(_call(*lengths).values())
        assert torch.equal(compiled(*given), _model(*given))
    assert len(graphs) == 1


def _longest_of(cu_seqlens):
    return (cu_seqlens[1:] - cu_seqlens[:-1]).max()


@pytest.mark.parametrize("read", [lambda x: x, torch.Tensor.item], ids=["tensor", "item"])
@pytest.mark.parametrize("how", ["eager", "compile", "export"])
def test_longest_known_to_the_device(how, read):
    """max_seqlen of lengths that the device knows: a tensor without dimensions, or a symbol."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v, cu_q, cu_k):
            longest = (read(_longest_of(cu)) for cu in (cu_q, cu_k))
            return fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest)

    call = _call()
    given = tuple(call.values())[:5]
    torch._dynamo.reset()
    model = Model()
    if how == "compile":
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif how == "export":
        model = torch.export.export(model, given).module()
    assert torch.equal(model(*given), fa3.flash_attn_varlen_func(**call))


def test_longest_below_zero_in_a_graph():
    """The operator refuses what a graph cannot know yet."""

    def attend(q, k, v, cu_q, cu_k):
        longest = (_longest_of(cu).item() - 100 for cu in (cu_q, cu_k))
        return fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="max_seqlen_q is -80, expected at least 0"):
        compiled(*tuple(_call().values())[:5])


def test_vmap():
    """seqused joins the batch; packed sequences have none to join."""
    q, k, v = (torch.randn(3, 2, 9, H_K, D).bfloat16() for _ in range(3))
    used = torch.tensor([[9, 4], [0, 7], [1, 2]]).int()

    def attend(q, k, v, used):
        return fa3.flash_attn_varlen_func(q, k, v, None, None, None, None, seqused_k=used)

    wanted = torch.stack([attend(*x) for x in zip(q, k, v, used, strict=True)])
    assert torch.equal(torch.vmap(attend)(q, k, v, used), wanted)
    call = _call()
    with pytest.raises(NotImplementedError, match="cu_seqlens_q .* vmap"):
        torch.vmap(lambda q: fa3.flash_attn_varlen_func(**call | {"q": q}))(call["q"][None])


def test_flops():
    """Of each sequence those of all pairs."""
    with FlopCounterMode(display=False) as counter:
        fa3.flash_attn_varlen_func(**_call())
    pairs = sum(a * b for a, b in zip(LENGTHS_Q, LENGTHS_K, strict=True))
    assert counter.get_total_flops() == 2 * H_Q * pairs * (D + D)


def test_a_call_needs_no_more_than_its_layout():
    """Other lengths in the same tensors are the same plan."""
    ops.plan_of.cache_clear()
    for lengths in ((3, 0, 20), (10, 10, 3), (0, 0, 23)):
        fa3.flash_attn_varlen_func(**_call(lengths, LENGTHS_K))
    assert ops.plan_of.cache_info().misses == 1
