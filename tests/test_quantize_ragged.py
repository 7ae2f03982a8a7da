"""quantize_fp8 of sequences with lengths of their own: each as if alone, whatever is around it."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa3
from fa3 import emulator
from fa3.call import lengths
from fa3.launch import jit

from . import quantize_reference as reference
from .cases import Bordered
from .conftest import HOPPER
from .fp8_calls import exact
from .ragged_cases import Rows
from .test_ragged import SHARING_OUT

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
H_Q, H_K, D = 4, 2, 64
LENGTHS = (70, 0, 130, 3), (200, 40, 0, 129)
SMOOTH = {"smooth_k": True, "smooth_v": True, "hadamard": True}


@pytest.fixture(params=["kernel", "plain torch"])
def where(request) -> torch.device:
    if request.param == "kernel":
        return request.getfixturevalue("device")
    request.getfixturevalue("plain_torch")
    return torch.device("cpu")


class Call:
    """Tensors in which the rows that do not count, and all memory around, are NaN."""

    def __init__(self, rows: tuple[str, str], device, layout="bshd", of_lengths=LENGTHS):
        self.queries, self.keys = (Rows(*x) for x in zip(rows, of_lengths, strict=True))
        self.sides = self.queries, self.keys, self.keys
        self.tensors = []
        for side, heads, offset in zip(self.sides, (H_Q, H_K, H_K), (0, 2, 2), strict=True):
            values = torch.randn(*side.shape, heads, D) + offset * torch.randn(heads, D)
            self.tensors.append(side.bordered(values.bfloat16().to(device), layout))
        self.given = [
            side.given(x.tensor) for side, x in zip(self.sides, self.tensors, strict=True)
        ]
        self.bounds = self.queries.arguments("q", device) | self.keys.arguments("k", device)
        self.lengths = {name: x for name, x in self.bounds.items() if "max" not in name}

    def inputs(self):
        """q, k and v of each sequence."""
        each = (side.each(x.values) for side, x in zip(self.sides, self.tensors, strict=True))
        return zip(*each, strict=True)

    def results(self, given: fa3.Fp8Inputs, rows: int):
        """What each sequence was given, as a dense call gives it."""

        def each(side, x):
            return side.each(x if side.kind == "dense" else x[None])

        def scales(side, x, rows):
            return side.blocks(x, rows) if x.dim() == 3 else x.split(1)

        count, lse = len(self.queries.lengths), given.lse_shift
        lse = lse if lse is None or self.queries.kind == "dense" else lse[None]
        return map(
            fa3.Fp8Inputs,
            *(each(side, x) for side, x in zip(self.sides, given[:3], strict=True)),
            scales(self.queries, given.q_descale, 128),
            scales(self.keys, given.k_descale, rows),
            scales(self.keys, given.v_descale, rows),
            count * [None] if lse is None else self.queries.each(lse, row_dim=2),
            count * [None] if given.v_shift is None else given.v_shift.split(1),
        )


def _assert_defined(given: fa3.Fp8Inputs) -> None:
    """Also what belongs to no sequence: check_scales=True would refuse it else."""
    for descale in (given.q_descale, given.k_descale, given.v_descale):
        assert (descale > 0).all() and descale.isfinite().all()
    assert given.v_shift is None or given.v_shift.isfinite().all()


@pytest.mark.parametrize(
    ("options", "rows", "layout"),
    [
        ({}, ("slack", "packed"), "packed"),
        ({"block_scales": False, "hadamard": True, "qk_dtype": torch.int8}, ("packed", "dense"), 0),
        ({"v_per_channel": True, "rows_per_block": 64, "v_dtype": E5M2}, ("dense", "slack"), 0),
    ],
    ids=str,
)
def test_a_sequence_is_quantised_as_if_alone(options, rows, layout, where):
    """Bit by bit."""
    call = Call(rows, where, layout or "bshd")
    given = fa3.quantize_fp8(*call.given, smooth_v=False, **options, **call.lengths)
    _assert_defined(given)
    block = options.get("rows_per_block", 128)
    for inputs, own in zip(call.inputs(), call.results(given, block), strict=True):
        alone = fa3.quantize_fp8(*inputs, smooth_v=False, **options)
        for a, b in zip(own[:6], alone[:6], strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) or a.numel() == 0


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (SMOOTH, ("packed", "packed")),
        ({"smooth_v": True, "rows_per_block": 64, "block_scales": False}, ("packed", "slack")),
        ({"smooth_v": True, "smooth_k": True, "v_per_channel": True}, ("slack", "dense")),
    ],
    ids=str,
)
def test_means_and_errors_are_those_of_the_sequence(options, rows, where):
    call = Call(rows, where)
    given = fa3.quantize_fp8(*call.given, **options, **call.lengths)
    _assert_defined(given)
    block = options.get("rows_per_block", 128)
    for (q, k, v), own in zip(call.inputs(), call.results(given, block), strict=True):
        if q.shape[1] and k.shape[1]:
            reference.check(options, q, k, v, own)
        elif k.shape[1] == 0:
            assert not own.v_shift.any()
            assert own.lse_shift is None or not own.lse_shift.any()


def test_dense_tensors_beside_packed_ones(where):
    """All of their rows count; the means that they need are of sequences all the same."""
    q, k, v = (torch.randn(2, 70, 2, D, device=where).bfloat16() for _ in range(3))
    cu = torch.tensor([0, 70, 140], dtype=torch.int32, device=where)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    wanted = fa3.quantize_fp8(q, k, v, **SMOOTH, block_scales=False)
    q_packed = fa3.quantize_fp8(packed[0], k, v, **SMOOTH, block_scales=False, cu_seqlens_q=cu)
    k_packed = fa3.quantize_fp8(q, *packed[1:], **SMOOTH, block_scales=False, cu_seqlens_k=cu)
    assert torch.equal(q_packed.q.float(), wanted.q.flatten(0, 1).float())
    shift = torch.cat(wanted.lse_shift.unbind(), dim=1)
    torch.testing.assert_close(q_packed.lse_shift, shift, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(k_packed.lse_shift, wanted.lse_shift, rtol=1e-5, atol=1e-4)
    for a in (q_packed, k_packed):
        for name in ("q_descale", "k_descale", "v_descale", "v_shift"):
            torch.testing.assert_close(getattr(a, name), getattr(wanted, name))


def test_rows_of_nobody_are_not_written(where, monkeypatch):
    empty, sentinel = torch.empty, 0x55

    def filled(*arguments, **options):
        x = empty(*arguments, **options)
        x.view(torch.uint8).fill_(sentinel)
        return x

    call = Call(("slack", "slack"), where)
    monkeypatch.setattr(torch, "empty", filled)
    given = fa3.quantize_fp8(*call.given, **call.lengths, smooth_v=False)
    for side, x in zip(call.sides, given[:3], strict=True):
        codes = x.view(torch.uint8)[None]
        for own in side.each(codes):
            assert own.numel() == 0 or (own != sentinel).any()
            own.fill_(sentinel)
        assert (codes == sentinel).all()
    _assert_defined(given)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "used"),
    [
        ([0, 190, 40, 220], [0, 150, 100, 250], [9, -5, 2**31 - 1]),
        ([0, 60, 120, 4000], [-50, 50, 2**31 - 1, -(2**31)], None),
        ([2**31 - 1, 0, 5, -1], [200, 200, 200, 5000], [-1, -1, -1]),
    ],
    ids=str,
)
def test_bad_lengths_reach_nothing_else(cu_q, cu_k, used, device, monkeypatch):
    """The host cannot know them on a GPU. Scales and shifts stay finite."""
    monkeypatch.setattr(lengths, "check_values", lambda *arguments, **options: None)
    q, k, v = (
        Bordered(torch.randn(1, rows, heads, D, device=device).bfloat16(), "bshd")
        for rows, heads in ((220, H_Q), (250, H_K), (250, H_K))
    )
    cu_q, cu_k, used = (
        None if x is None else torch.tensor(x, dtype=torch.int32, device=device)
        for x in (cu_q, cu_k, used)
    )
    names = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_q": used, "seqused_k": used}
    with nullcontext() if HOPPER else emulator.options(checks=SHARING_OUT):
        for options in (SMOOTH, {"smooth_v": True, "rows_per_block": 64, "block_scales": False}):
            given = fa3.quantize_fp8(*(x.tensor[0] for x in (q, k, v)), **options, **names)
            _assert_defined(given)


def test_rows_before_the_first_sequence(device, monkeypatch):
    """Refused where the host can know it; elsewhere they belong to nobody."""
    monkeypatch.setattr(lengths, "check_values", lambda *arguments, **options: None)
    x = torch.randn(300, 2, D, device=device).bfloat16()
    x[:150] = 1000
    cu = torch.tensor([150, 300], dtype=torch.int32, device=device)
    given = fa3.quantize_fp8(x, x, x, smooth_v=False, cu_seqlens_q=cu, cu_seqlens_k=cu)
    alone = fa3.quantize_fp8(*3 * [x[None, 150:]], smooth_v=False)
    assert torch.equal(given.v[150:].float(), alone.v[0].float())
    assert torch.equal(given.v_descale[..., 1:], alone.v_descale)
    assert (given.v_descale[..., 0] == 1).all()


@pytest.mark.parametrize("shapes", [(0, 5, 2), (5, 0, 2), (0, 0, 2), (200, 200, 0)], ids=str)
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "heads"])
def test_nothing_to_quantise(shapes, blocks, where):
    """No queries, no keys, neither, no sequences: the fake tells the same shapes."""
    total_q, total_k, batch = shapes
    q, k, v = (torch.randn(n, 2, D, device=where).bfloat16() for n in (total_q, total_k, total_k))
    cu_q, cu_k = (
        torch.tensor([0, *batch * [n]], dtype=torch.int32, device=where) for n in (total_q, total_k)
    )
    options = {**SMOOTH, "block_scales": blocks}
    given = fa3.quantize_fp8(q, k, v, **options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    _assert_defined(given)
    with FakeTensorMode() as mode:
        q, k, v, cu_q, cu_k = (mode.from_tensor(x) for x in (q, k, v, cu_q, cu_k))
        wanted = fa3.quantize_fp8(q, k, v, **options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for a, b in zip(given, wanted, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_other_lengths_need_no_other_kernel(device, monkeypatch):
    first, other = (
        Call(("packed", "slack"), device, of_lengths=x)
        for x in (((70, 3), (40, 100)), ((5, 300, 1), (0, 70, 200)))
    )
    fa3.quantize_fp8(*first.given, **SMOOTH, **first.lengths)
    monkeypatch.setattr(jit, "_build", None)
    monkeypatch.setattr(jit, "_load", None)
    fa3.quantize_fp8(*other.given, **SMOOTH, **other.lengths)


def _rms(x) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("where", "causal", "bound", "lse_bound"),
    [("kernel", True, 0.08, 0.15), ("plain torch", False, 0.06, 0.1)],
    indirect=["where"],
)
def test_fp8_attention_in_one_call(where, causal, bound, lse_bound):
    """Within FP8's rounding of attention of each sequence, with the bounds of the dense call."""
    call = Call(("slack", "packed"), where, of_lengths=((70, 65, 0, 3), (140, 65, 33, 9)))
    out, lse = fa3.flash_attn_varlen_fp8_func(
        *call.given, **call.bounds, causal=causal, return_attn_probs=True
    )
    wanted = [exact(*(x.cpu() for x in inputs), D**-0.5, causal) for inputs in call.inputs()]
    exact_out, exact_lse = (
        torch.cat(x, d) for x, d in zip(zip(*wanted, strict=True), (1, 2), strict=True)
    )
    out = torch.cat(list(call.queries.each(out[None].cpu())), dim=1)
    lse = torch.cat(list(call.queries.each(lse[None].cpu(), row_dim=2)), dim=2)
    assert _rms(out - exact_out) <= bound * _rms(exact_out)
    assert (lse - exact_lse).abs().max() <= lse_bound


def test_both_steps_apart(plain_torch):
    call = Call(("packed", "slack"), torch.device("cpu"))
    out, lse = fa3.flash_attn_varlen_fp8_func(*call.given, **call.bounds, return_attn_probs=True)
    x = fa3.quantize_fp8(*call.given, **SMOOTH, **call.lengths)
    apart, apart_lse = fa3.flash_attn_varlen_func(
        *x[:3], **call.bounds, **x.scales, return_attn_probs=True, check_scales=True
    )
    used = sum(call.queries.lengths)
    assert torch.equal(out[:used], apart[:used])
    torch.testing.assert_close(lse[:, :used], (apart_lse + D**-0.5 * x.lse_shift)[:, :used])


def test_defaults_of_torch_change_nothing(plain_torch):
    call = Call(("slack", "packed"), torch.device("cpu"))
    options = {**SMOOTH, "block_scales": False, **call.lengths}
    wanted = fa3.quantize_fp8(*call.given, **options)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            given = fa3.quantize_fp8(*call.given, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("q_descale", "k_descale", "v_descale", "v_shift"):
        torch.testing.assert_close(getattr(given, name), getattr(wanted, name), rtol=0, atol=0)


def _packed(q_lengths=(70, 30), k_lengths=(90, 20), dtype=torch.bfloat16):
    q, k, v = (
        torch.randn(sum(n), heads, D).to(dtype)
        for n, heads in ((q_lengths, H_Q), (k_lengths, H_K), (k_lengths, H_K))
    )
    cu_q, cu_k = (
        torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for x in (q_lengths, k_lengths)
    )
    return q, k, v, cu_q, cu_k


def _model(q, k, v, cu_q, cu_k, most):
    of_lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    x = fa3.quantize_fp8(q * 2, k, v, **SMOOTH, block_scales=False, **of_lengths)
    out, lse = fa3.flash_attn_varlen_fp8_func(
        q, k, v, cu_q, cu_k, most, most, causal=True, return_attn_probs=True
    )
    return out + 1, lse, *(y.float() + 1 for y in x)


@pytest.mark.usefixtures("plain_torch")
def test_compile_without_graph_breaks():
    """One graph for all lengths and numbers of sequences."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(_model, fullgraph=True, backend=backend, dynamic=True)
    for q_lengths, k_lengths in (((700, 30), (600, 20)), ((5, 130, 60), (200, 0, 300))):
        given = *_packed(q_lengths, k_lengths), 700
        for a, b in zip(compiled(*given), _model(*given), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "heads"])
def test_opcheck(blocks):
    q, k, v, cu_q, cu_k = _packed()
    arguments = q, k, v, True, True, blocks, blocks, not blocks, 128, E4M3, E4M3, cu_q, cu_k
    used = torch.tensor([90, 20], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fa3.quantize_fp8.default, (*arguments, None, used))


@pytest.mark.usefixtures("plain_torch")
def test_vmap():
    """Lengths of dense tensors are mapped over as the tensors are; packed ones are refused."""
    q, k, v = (torch.randn(3, 2, 20, 2, D).bfloat16() for _ in range(3))
    used = torch.tensor([[20, 7], [1, 9], [0, 20]], dtype=torch.int32)

    def call(q, k, v, used):
        x = fa3.quantize_fp8(q, k, v, seqused_k=used)
        return x.q.float(), x.k_descale, x.v_descale, x.v_shift

    given = torch.vmap(call)(q, k, v, used)
    wanted = [call(*x) for x in zip(q, k, v, used, strict=True)]
    for a, b in zip(given, zip(*wanted, strict=True), strict=True):
        assert torch.equal(a, torch.stack(b))
    q, k, v, cu_q, cu_k = _packed()
    with pytest.raises(NotImplementedError, match="cu_seqlens_k is a tensor, but vmap has no rule"):
        torch.vmap(lambda k: fa3.quantize_fp8(q[None], k, v, cu_seqlens_k=cu_k))(k[None])


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 70, 100]}, TypeError, "cu_seqlens_q is a list, expected a torch.Ten"),
        ({"cu_seqlens_q": torch.tensor([0, 100])}, TypeError, "cu_seqlens_q has dtype torch.int64"),
        ({"cu_seqlens_k": None}, ValueError, "k has 3 dimensions, .*, expected 4 without cu_seqle"),
        ({"seqused_k": torch.zeros(3).int()}, ValueError, "seqused_k has batch 3 but cu_seqlens_q"),
        (
            {"cu_seqlens_k": torch.tensor([0, 120, 110]).int()},
            ValueError,
            r"cu_seqlens_k\[2\] is 110, expected at least 120",
        ),
        ({"seqused_q": torch.tensor([9, 31]).int()}, ValueError, r"seqused_q\[1\] is 31, expected"),
        ({"max_seqlen_q": 70}, TypeError, r"quantize_fp8\(\) has no argument 'max_seqlen_q'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(changes, error, message):
    q, k, v, cu_q, cu_k = _packed()
    given = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k} | changes
    with pytest.raises(error, match=message):
        fa3.quantize_fp8(q, k, v, **given)


@pytest.mark.usefixtures("plain_torch")
def test_bad_lengths_of_the_one_call(monkeypatch):
    """Refused before anything is quantised."""
    monkeypatch.setattr(fa3.quantize_plan, "_kernel", lambda *_: pytest.fail("quantised"))
    q, k, v, cu_q, cu_k = _packed()
    for most, options, message in (
        (60, {}, "max_seqlen_q is 60, expected at least 70"),
        (None, {}, "max_seqlen_q is None but cu_seqlens_q is a tensor"),
        (70, {"check_lengths": True}, r"cu_seqlens_q\[-1\] is 100, expected 101"),
        (70, {"softmax_scale": math.nan}, "softmax_scale is nan"),
    ):
        x = torch.cat([q, q[:1]]) if options.get("check_lengths") else q
        with pytest.raises(ValueError, match=message):
            fa3.flash_attn_varlen_fp8_func(x, k, v, cu_q, cu_k, most, 90, **options)
