"""Gradients of sequences with lengths of their own: accuracy, and that neighbours never meet."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.utils.checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fa3
from fa3 import autograd, emulator
from fa3.call import lengths
from fa3.call.mask import MaskSpec
from fa3.inspect.report import analyse
from fa3.kernels.bwd_arguments import PARTS
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import head_dim_tile
from fa3.launch import dispatch, jit, tuning

from . import reference
from .accuracy import assert_accurate
from .backward_cases import gradients
from .cases import MASKS, Bordered, pairwise
from .conftest import HOPPER
from .ragged_cases import RaggedCase, Rows

NAMES = ("dq", "dk", "dv")


@dataclass(frozen=True)
class RaggedBackwardCase(RaggedCase):
    """One call of flash_attn_varlen_func and the gradients of its inputs."""

    with_lse: bool = False
    deterministic: bool = False
    softcap: float = 0.0

    def arguments(self, device) -> dict:
        return super().arguments(device) | {"softcap": self.softcap}


# Few kernels, of every kind: dtype, head dims, mask, deterministic.
KERNELS = (
    ("bf16", (64, 64), MASKS[1], False),
    ("fp16", (96, 88), MASKS[3], True),
    ("bf16", (128, 128), MASKS[0], False),
    ("fp16", (120, 104), MASKS[1], True),
    ("bf16", (192, 128), MASKS[1], False),
    ("bf16", (256, 248), MASKS[2], False),
)
FACTORS = {
    "kernel": KERNELS,
    "lengths": (  # of q, of k
        ((66, 0, 5, 0, 80), (100, 40, 0, 0, 33)),
        ((1, 1, 64), (7, 140, 64)),
    ),
    "rows": (("packed", "packed"), ("slack", "dense"), ("dense", "slack")),
    "heads": ((2, 2), (2, 1)),
    "layout": ("bshd", "bhsd", "packed"),
    "scale": (None, 0.3),
    "num_ctas": (None, 1),
    "with_lse": (False, True),
}


def covering(seed: int = 1) -> list[RaggedBackwardCase]:
    """In the order of their kernels."""
    cases = []
    for row in pairwise(FACTORS, seed):
        dtype, (head_dim, head_dim_v), (causal, window), deterministic = row["kernel"]
        cases.append(
            RaggedBackwardCase(
                *row["lengths"],
                *row["rows"],
                dtype,
                head_dim,
                head_dim_v,
                *row["heads"],
                causal,
                window,
                row["layout"],
                row["scale"],
                row["num_ctas"],
                with_lse=row["with_lse"],
                deterministic=deterministic,
            )
        )
    return sorted(cases, key=lambda c: (c.head_dim, c.causal, repr(c)))


@dataclass(frozen=True)
class Call:
    """The tensors of a backward pass, with NaN in the rows that belong to nobody and around."""

    case: RaggedBackwardCase
    inputs: tuple[Bordered, Bordered, Bordered]
    out: Bordered
    dout: Bordered
    lse: torch.Tensor  # (entries, h_q, rows), as dlse
    dlse: torch.Tensor | None

    @staticmethod
    def of(case: RaggedBackwardCase, device) -> "Call":
        inputs = case.inputs(device)
        shape = *inputs[0].values.shape[:3], case.head_dim_v
        out, dout = (
            case.queries.bordered(torch.randn(shape).to(inputs[0].values), case.layout)
            for _ in range(2)
        )
        queries, keys = case.queries, case.keys
        q, k, v = (x.tensor for x in inputs)
        _, lse = fa3.flash_attn_varlen_func(
            *(queries.given(q), keys.given(k), keys.given(v)),
            **case.arguments(device),
            out=queries.given(out.tensor),
            return_attn_probs=True,
        )
        lse = lse if case.rows_q == "dense" else lse[None]
        numbers = torch.full_like(lse, math.nan), torch.full_like(lse, math.nan)
        for target, source in zip(*(queries.each(x, 2) for x in (numbers[0], lse)), strict=True):
            target.copy_(source)
        for target in queries.each(numbers[1], 2):
            target.copy_(torch.randn_like(target))
        dlse = numbers[1] if case.with_lse else None
        return Call(case, inputs, out, dout, numbers[0], dlse)

    def gradients(self, device) -> tuple[torch.Tensor, ...]:
        """Each (entries, rows, heads, width)."""
        case, queries, keys = self.case, self.case.queries, self.case.keys
        q, k, v = (x.tensor for x in self.inputs)
        given = {
            **{"dout": self.dout.tensor, "q": q, "out": self.out.tensor, "lse": self.lse},
            "dlse": self.dlse,
        }
        given = {n: None if x is None else queries.given(x) for n, x in given.items()}
        given |= {"k": keys.given(k), "v": keys.given(v)}
        options = case.arguments(device)
        options["window_left"], options["window_right"] = options.pop("window_size")
        del options["num_splits"]
        if case.num_ctas is not None:
            options["sm_margin"] = dispatch.target_of(device).num_sms - case.num_ctas
        *found, _ = torch.ops.fa3.backward(**given, **options, deterministic=case.deterministic)
        packed = (case.rows_q != "dense", *[case.rows_k != "dense"] * 2)
        return tuple(x[None] if p else x for x, p in zip(found, packed, strict=True))

    def expected(self, attend) -> list[torch.Tensor]:
        """Of all sequences, one after another."""
        case, queries, keys = self.case, self.case.queries, self.case.keys
        rows = (queries, keys, keys)
        cut = [r.each(x.values) for r, x in zip(rows, self.inputs, strict=True)]
        dlses = [None] * len(case.lengths_q)
        if self.dlse is not None:
            dlses = list(queries.each(self.dlse, 2))
        found = []
        for *x, dout, dlse in zip(*cut, queries.each(self.dout.values), dlses, strict=True):
            x = [t.clone().requires_grad_() for t in x]
            if x[0].shape[1] == 0 or x[1].shape[1] == 0:
                found.append([torch.zeros_like(t) for t in x])
            else:
                results = attend(*x, case.softmax_scale, **case.mask, softcap=case.softcap)
                found.append(gradients(results, x, dout, dlse))
        return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


def _parts(case: RaggedCase, found) -> list[torch.Tensor]:
    """What belongs to sequences, one after another."""
    rows = (case.queries, case.keys, case.keys)
    return [torch.cat(list(r.each(x)), dim=1) for r, x in zip(rows, found, strict=True)]


def check(case: RaggedBackwardCase, device) -> None:
    call = Call.of(case, device)
    found = call.gradients(device)
    given = _parts(case, found)
    expected = (call.expected(x) for x in (reference.exact, reference.baseline_with_lse))
    for name, *x in zip(NAMES, given, *expected, strict=True):
        assert_accurate(name, *x)
    for name, rows, x in zip(NAMES, (case.queries, case.keys, case.keys), found, strict=True):
        for own in rows.each(x):
            own.fill_(0.0)
        assert (x == 0).all(), f"{name}: rows that belong to nobody are not 0"
    tensors = *call.inputs, call.out, call.dout
    for name, x in zip(("q", "k", "v", "out", "dout"), tensors, strict=True):
        x.assert_border_untouched(name)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_accuracy(case, device, poisoned):
    check(case, device)


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
def test_deterministic_gradients_are_the_same_under_every_schedule(device):
    """Also those of rows that belong to nobody."""
    rows = (70, 0, 9), (200, 9, 30), "slack", "dense"
    case = RaggedBackwardCase(
        *rows, "fp16", 96, 88, h_q=1, h_k=1, causal=True, window=(100, -1), num_ctas=1
    )
    call = Call.of(replace(case, deterministic=True), device)
    emulator.compare_schedules(lambda: call.gradients(device), seeds=range(2))


def test_other_lengths_need_no_other_kernel(device, monkeypatch):
    case = RaggedBackwardCase((7, 3), (4, 10), causal=True)
    check(case, device)
    monkeypatch.setattr(jit, "_build", None)
    monkeypatch.setattr(jit, "_load", None)
    others = {"rows_q": "dense", "rows_k": "slack", "h_q": 4}  # rows: more than FEW_ROWS
    check(replace(case, lengths_q=(5, 66, 10), lengths_k=(7, 0, 3), **others), device)


# Sequences that overlap write the same rows, and read what is not theirs to clear.
SHARED = tuple(set(emulator.ALL_CHECKS) - {"global", "race", "uninit"})


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([0, 90, 40, 120], [0, 150, 20, 150]),  # falls
        ([0, 60, 120, 4000], [0, 50, 100, 5000]),  # beyond the tensors
        ([-9, 60, 120, 120], [-50, 50, 100, 150]),
        ([0, 2**31 - 1, -(2**31), 120], [2**31 - 1, 0, 5, -1]),
    ],
    ids=str,
)
def test_bad_lengths_reach_nothing_else(cu_q, cu_k, device, monkeypatch):
    """Nor does a tile wait for one that there is not."""
    monkeypatch.setattr(lengths, "check_values", lambda *arguments, **options: None)
    queries, keys = Rows("packed", (120,)), Rows("packed", (150,))
    case = RaggedBackwardCase((120,), (150,), "packed", "packed", "fp16", 96, 88)

    def tensor(rows, width):
        values = torch.randn(1, sum(rows.lengths), 2, width, device=device).half()
        return Bordered(values, case.layout)

    sizes = {"dout": (queries, 88), "q": (queries, 96), "k": (keys, 96), "v": (keys, 88)}
    given = {name: tensor(*size) for name, size in sizes.items()}
    given["out"] = tensor(queries, 88)
    tensors = {name: x.tensor[0] for name, x in given.items()}
    numbers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (cu_q, cu_k)]
    options = {"window_left": 100, "causal": True, "deterministic": True}
    options |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), numbers, strict=True))
    lse = torch.randn(2, 120, device=device)
    with nullcontext() if HOPPER else emulator.options(checks=SHARED):
        torch.ops.fa3.backward(**tensors, lse=lse, **options)
    for name, x in given.items():
        x.assert_border_untouched(name)


CU = [0, 30, 30, 70]  # of q and k, which have two rows more


def _packed(device, d=64):
    torch.manual_seed(7)
    q, k, v = (torch.randn(72, 2, d, device=device).bfloat16().requires_grad_() for _ in range(3))
    return (q, k, v), torch.tensor(CU, dtype=torch.int32, device=device)


def _one_by_one(q, k, v, dout):
    """Gradients of the sequences, and zeros."""
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for start, end in zip(CU, CU[1:], strict=False):
        if end > start:
            x = [t.detach()[None, start:end].requires_grad_() for t in (q, k, v)]
            results = reference.exact(*x, causal=True)
            for target, value in zip(
                found, gradients(results, x, dout[None, start:end]), strict=True
            ):
                target[start:end] = value[0]
    return found


def _close(given, wanted):
    for x, y in zip(given, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=0.03, rtol=0.03)


def test_autograd(device, poisoned):
    """Packed, dense on one side, and dense on both with seqused; lse and dlse are packed, too."""
    (q, k, v), cu = _packed(device)
    options = {"causal": True, "return_attn_probs": True}
    out, lse = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, **options)
    assert lse.shape == (2, 72)
    dout = torch.full_like(out, math.nan)
    dout[:70] = torch.randn_like(dout[:70])
    wanted = _one_by_one(q, k, v, dout)
    _close(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), wanted)
    dlse = torch.full_like(lse, math.nan)
    dlse[:, :70] = 0.0
    _close(torch.autograd.grad((out, lse), (q, k, v), (dout, dlse)), wanted)

    starts, used = cu[:-1].tolist(), cu.diff()

    def dense(x):
        return torch.stack([x[i : i + 40] for i in starts])

    k2, v2, q2 = (dense(x.detach()).requires_grad_() for x in (k, v, q))
    out = fa3.flash_attn_varlen_func(q, k2, v2, cu, None, 40, None, None, used, causal=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k2, v2), dout)
    lengths_k = (torch.arange(40, device=device) < used[:, None])[..., None, None]
    of_dense = [dense(x) * lengths_k for x in wanted]
    _close((dq, dk, dv), (wanted[0], *of_dense[1:]))
    out = fa3.flash_attn_varlen_func(q2, k2, v2, None, None, None, None, used, used, causal=True)
    _close(torch.autograd.grad(out, (q2, k2, v2), dense(dout)), of_dense)


def test_deterministic_reaches_the_kernels(plain_torch, monkeypatch):
    (q, k, v), cu = _packed(torch.device("cpu"))
    asked = []
    run = autograd.run
    monkeypatch.setattr(autograd, "run", lambda *x: (asked.append(x[7]), run(*x))[1])
    for deterministic in (False, True):
        more = {"causal": True, "deterministic": deterministic}
        fa3.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, **more)[:70].sum().backward()
    assert asked == [False, True]


def test_only_what_is_asked_for(device, poisoned):
    """Without dQ, of packed and of dense queries; without dK and dV."""
    (q, k, v), cu = _packed(device)
    dout = torch.randn_like(q)
    wanted = _one_by_one(q, k, v, dout)
    out = fa3.flash_attn_varlen_func(q.detach(), k, v, cu, cu, 40, 40, causal=True)
    _close(torch.autograd.grad(out, (k, v), dout), wanted[1:])
    out = fa3.flash_attn_varlen_func(q, k.detach(), v.detach(), cu, cu, 40, 40, causal=True)
    _close(torch.autograd.grad(out, (q,), dout), wanted[:1])
    dense, used = (x.detach()[:60].view(2, 30, 2, 64) for x in (q, k, v)), cu.new_tensor([30, 7])
    q, k, v = dense
    k.requires_grad_()
    out = fa3.flash_attn_varlen_func(q, k, v, None, None, None, None, used, used, causal=True)
    (dk,) = torch.autograd.grad(out[:, :7].float().sum(), k)
    assert dk.isfinite().all() and (dk[1, 7:] == 0).all() and (dk[1, :7] != 0).any()


def test_compile_with_other_lengths(device):
    """Without a graph break, and once."""
    (q, k, v), cu = _packed(device)

    def loss(q, k, v, cu, longest):
        out = fa3.flash_attn_varlen_func(q * 1.0, k, v, cu, cu, longest, longest, causal=True)
        return out[:70].float().square().sum()

    def gradients_of(function, *lengths):
        return torch.autograd.grad(function(q, k, v, *lengths), (q, k, v))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    _close(gradients_of(compiled, cu, 40), gradients_of(loss, cu, 40))
    others = (cu + 1).clamp(0, 70) * (cu > 0), 44
    with torch.compiler.set_stance("fail_on_recompile"):
        given = gradients_of(compiled, *others)
    _close(given, gradients_of(loss, *others))


def test_opcheck(device):
    (q, k, v), cu = _packed(device)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 40, "max_seqlen_k": 40}
    options = {"causal": True, **lengths}
    q, k, v = (x.detach()[:70].requires_grad_() for x in (q, k, v))
    torch.library.opcheck(torch.ops.fa3.forward.default, (q, k, v), options)
    out, lse = (x.detach() for x in torch.ops.fa3.forward(q, k, v, **options))
    given = (out, *(x.detach() for x in (q, k, v)), out, lse, lse)
    torch.library.opcheck(torch.ops.fa3.backward.default, given, options)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    (q, k, v), cu = _packed(device)
    dout = torch.randn_like(q)
    out = torch.utils.checkpoint.checkpoint(
        lambda *x: fa3.flash_attn_varlen_func(*x, cu, cu, 40, 40, causal=True),
        *(q, k, v),
        use_reentrant=use_reentrant,
    )
    out.backward(dout)
    _close((q.grad, k.grad, v.grad), _one_by_one(q, k, v, dout))


def test_nothing_at_all(device, poisoned):
    """No key, no query, no sequence: all gradients are zeros."""
    cu = torch.tensor([0, 0, 0], dtype=torch.int32, device=device)
    for sizes in ((0, 3), (3, 0), (0, 0)):
        inputs = [
            torch.randn(n, 2, 64, device=device).bfloat16().requires_grad_()
            for n in (sizes[0], sizes[1], sizes[1])
        ]
        out = fa3.flash_attn_varlen_func(*inputs, cu, cu, 4, 4, causal=True)
        for x, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
            assert gradient.shape == x.shape and (gradient == 0).all()


def test_lengths_changed_in_place_are_noticed(device):
    (q, k, v), cu = _packed(device)
    out = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, causal=True)
    cu[1] = 20
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_bad_lengths_are_named(device):
    (q, k, v), cu = _packed(device)
    out, lse = (
        x.detach() for x in torch.ops.fa3.forward(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    )
    given = out, *(x.detach() for x in (q, k, v)), out, lse
    for bad, error, words in (
        ({"cu_seqlens_q": cu.long()}, TypeError, "cu_seqlens_q has dtype torch.int64"),
        ({"cu_seqlens_k": cu[1:]}, ValueError, "cu_seqlens_k has batch 2 but cu_seqlens_q has 3"),
        ({"seqused_k": cu}, ValueError, "seqused_k has batch 4 but cu_seqlens_q has 3"),
        ({"dlse": lse[:, 1:]}, ValueError, "dlse has shape"),
    ):
        with pytest.raises(error, match=words):
            options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "causal": True, **bad}
            torch.ops.fa3.backward(*given, **options)


def test_pages_have_no_backward_pass(plain_torch):
    q, k = torch.zeros(2, 4, 2, 64).bfloat16().requires_grad_(), torch.zeros(4, 8, 2, 64).bfloat16()
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="requires_grad.*page_table is a tensor"):
        fa3.flash_attn_varlen_func(q, k, k, None, None, None, None, page_table=table)


def test_operations_are_counted():
    """Of each sequence, as five products to the forward pass's two."""
    q, k, v = (
        torch.empty(70, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (4, 2, 2)
    )
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    with FlopCounterMode(display=False) as forward:
        out = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 40, 30, causal=True)
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.empty_like(out))
    assert forward.get_total_flops() == 4 * 4 * 2 * (40 * 30) * 64
    assert backward.get_total_flops() == 2.5 * forward.get_total_flops()


def test_nothing_of_a_ragged_kernel_spills():
    """Its steady loop is that of the dense kernel; what a sequence is takes registers, too."""
    for case in {(c.dtype, c.head_dim, c.causal): c for c in covering()}.values():
        tiles = head_dim_tile(case.head_dim), head_dim_tile(case.head_dim_v)
        mask = MaskSpec.of(case.causal, *case.window).kind
        signature = BwdSignature(case.dtype, *tiles, mask, case.deterministic, is_ragged=True)
        where = dispatch.BACKWARD[0].where
        report = analyse(jit.artifacts(where, signature, tuning.backward(signature)).cubin)
        assert report.warnings == () and report.resources.frame == 0, signature


def test_memory_is_linear_in_the_rows(device):
    """A sequence more costs a block of the workspace at most."""

    def numbers(rows, batch):
        x = rows, 2, 128
        fields = [(x, (256, 128, 1), torch.bfloat16, device)] * 5
        lse = (2, rows), (rows, 1), torch.float32, device
        cu = (batch + 1,), (1,), torch.int32, device
        lengths = cu, cu, None, None
        plan = autograd.plan_of(
            *fields, lse, False, (True, True), lengths, None, True, -1, -1, 0, 0.0
        )
        return [math.prod(x[0]) for x in plan.workspace if x is not None]

    one, two, more = numbers(4096, 1), numbers(8192, 1), numbers(4096, 9)
    assert all(b < 2 * a for a, b in zip(one, two, strict=True))
    blocks = 64 * 2 * 8  # queries, heads, sequences
    assert [b - a for a, b in zip(one, more, strict=True)][:3] == [
        2 * blocks,
        PARTS * blocks,
        128 * blocks,
    ]


def test_reference(plain_torch, poisoned):
    """CPU tensors without a kernel."""
    device = torch.device("cpu")
    for case in covering():
        if case.rows_q != "packed":
            check(replace(case, num_ctas=None), device)
    (q, k, v), cu = _packed(device)
    dout = torch.randn_like(q)
    out = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, causal=True)
    _close(torch.autograd.grad(out, (q, k, v), dout), _one_by_one(q, k, v, dout))


def test_softcap_and_sinks(device):
    """Each sequence's gradients are those that it has alone; the sink's is their sum."""
    lengths = (70, 3, 130)
    cu = torch.tensor([0, 70, 73, 203], dtype=torch.int32, device=device)
    score = {"causal": True, "softcap": 5.0}
    given = [torch.randn(210, h, 64, device=device).bfloat16() for h in (2, 1, 1, 2)]
    *inputs, dout = given
    inputs = [*(x.requires_grad_() for x in inputs), torch.ones(2, device=device).requires_grad_()]
    out = fa3.flash_attn_varlen_func(
        *inputs[:3], cu, cu, 130, 130, **score, learnable_sink=inputs[3]
    )
    dout[203:] = 0.0
    found = torch.autograd.grad(out, inputs, dout)
    wanted = [torch.zeros_like(x) for x in inputs]
    for start, length in zip(cu.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        alone = [x[None, rows].detach().requires_grad_() for x in inputs[:3]] + inputs[3:]
        out = fa3.flash_attn_func(*alone[:3], **score, learnable_sink=alone[3])
        for x, y in zip(wanted, torch.autograd.grad(out, alone, dout[None, rows]), strict=True):
            x += (
                y
                if x.dim() == 1
                else torch.nn.functional.pad(y[0], (0, 0, 0, 0, start, 210 - start - length))
            )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-2)
