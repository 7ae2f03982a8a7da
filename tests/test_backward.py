"""Gradients of flash_attn_func: accuracy, and what the kernels must never do."""

import math
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fa3
from fa3 import autograd, emulator, ops
from fa3.call.lengths import EQUAL
from fa3.kernels.bwd_arguments import PARTS
from fa3.launch import dispatch

from . import reference
from .accuracy import assert_accurate
from .backward_cases import SCORE_CASES, BackwardCase, attention, check, covering, gradients
from .cases import make_inputs
from .conftest import HOPPER


# One of each kind of mask first.
@pytest.mark.parametrize(
    "case",
    [
        BackwardCase(),
        BackwardCase(causal=True, s_q=200, s_k=200, h_k=1),
        BackwardCase(head_dim=128, head_dim_v=128, window=(30, 20), s_q=150, s_k=200),
    ],
    ids=str,
)
def test_first_light(case, device):
    check(case, device)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_accuracy(case, device):
    check(case, device)


@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_scores(case, device):
    """Softcap and sinks."""
    check(case, device)


def _inputs(case, device):
    return [x.values.clone().requires_grad_() for x in make_inputs(case, device)]


def _all(case, inputs, device, dout=None, dlse=None):
    results = attention(case, *inputs, device)
    dout = torch.ones_like(results[0]) if dout is None else dout
    return gradients(results, [x for x in inputs if x.requires_grad], dout, dlse)


def test_rows_that_see_no_key_have_no_gradient(device):
    """The first queries of a causal call with fewer keys, whatever comes back for them."""
    case = BackwardCase(head_dim=128, head_dim_v=128, s_q=150, s_k=40, causal=True)
    inputs = _inputs(case, device)
    out, lse = results = attention(case, *inputs, device)
    blind = case.s_q - case.s_k
    assert (lse[:, :, :blind] == -math.inf).all()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse[:, :, :blind] = math.nan
    dq, dk, dv = gradients(results, inputs, dout, dlse)
    assert (dq[:, :blind] == 0).all()
    seeing = [inputs[0][:, blind:].detach().clone().requires_grad_(), *inputs[1:]]
    alone = _all(case, seeing, device, dout[:, blind:], dlse[:, :, blind:])
    for given, wanted in zip((dq[:, blind:], dk, dv), alone, strict=True):
        torch.testing.assert_close(given, wanted)


def test_keys_that_no_query_sees_have_no_gradient(device):
    case = BackwardCase(s_q=40, s_k=300, window=(20, 0))
    _, dk, dv = _all(case, _inputs(case, device), device)
    unseen = case.s_k - case.s_q - 20
    assert (dk[:, :unseen] == 0).all() and (dv[:, :unseen] == 0).all()
    assert (dv[:, unseen:] != 0).any(dim=-1).all()


@pytest.mark.parametrize("factor", [1e-3, 30.0], ids=["flat", "peaked"])
def test_size_of_scores(factor, device):
    case = BackwardCase(head_dim=128, head_dim_v=128, s_q=70, s_k=130)
    q, k, v = _inputs(case, device)
    inputs = [(q * factor).detach().requires_grad_(), k, v]
    dout = torch.randn(case.batch, case.s_q, case.h_q, case.head_dim_v).to(q)
    given = _all(case, inputs, device, dout)
    exact = gradients(reference.exact(*inputs), inputs, dout)
    baseline = gradients(reference.baseline_with_lse(*inputs), inputs, dout)
    for name, *x in zip(("dq", "dk", "dv"), given, exact, baseline, strict=True):
        assert_accurate(name, *x)


def test_large_gradients_in_fp16(device):
    """They do not overflow where torch's do not."""
    case = BackwardCase("fp16", 128, 128, s_q=64, s_k=130)
    inputs = _inputs(case, device)
    dout = 500.0 * torch.randn(case.batch, case.s_q, case.h_q, case.head_dim_v).to(inputs[0])
    given = _all(case, inputs, device, dout)
    exact = gradients(reference.exact(*inputs), inputs, dout)
    baseline = gradients(reference.baseline_with_lse(*inputs), inputs, dout)
    for name, *x in zip(("dq", "dk", "dv"), given, exact, baseline, strict=True):
        assert x[2].isfinite().all() and x[1].abs().max() > 100
        assert_accurate(name, *x)


def test_scores_far_below_zero(device):
    """The padded keys' scores are 0, so that their P would be infinite were they not masked."""
    case = BackwardCase(s_q=64, s_k=100)
    q, k, v = _inputs(case, device)
    with torch.no_grad():
        q.fill_(8.0)
        k.mul_(0.1).sub_(8.0)
    given = _all(case, (q, k, v), device)
    exact = gradients(reference.exact(q, k, v), (q, k, v), torch.ones_like(q))
    baseline = gradients(reference.baseline_with_lse(q, k, v), (q, k, v), torch.ones_like(q))
    for name, *x in zip(("dq", "dk", "dv"), given, exact, baseline, strict=True):
        assert_accurate(name, *x)


@pytest.mark.parametrize(
    "case",
    [
        BackwardCase(s_q=150, s_k=300, h_q=2, h_k=1),
        BackwardCase(head_dim=128, head_dim_v=128, s_q=200, s_k=400, window=(100, 20), num_ctas=1),
        BackwardCase("fp16", 256, 256, s_q=130, s_k=130, h_q=1, h_k=1, causal=True),
    ],
    ids=str,
)
def test_deterministic(case, device, monkeypatch):
    """The same bits, whoever asks for it; they are those of the sums by ascending keys."""
    inputs = _inputs(case, device)
    out, lse = (x.detach() for x in attention(case, *inputs, device))
    given = torch.randn_like(out), *(x.detach() for x in inputs), out, lse
    sms = dispatch.target_of(device).num_sms
    options = {
        "causal": case.causal,
        "window_left": case.window[0],
        "window_right": case.window[1],
        "sm_margin": 0 if case.num_ctas is None else sms - case.num_ctas,
    }
    wanted = torch.ops.fa3.backward(*given, **options, deterministic=True)
    asked = []
    plan_of = autograd.plan_of
    monkeypatch.setattr(autograd, "plan_of", lambda *x: (asked.append(x[6]), plan_of(*x))[1])
    torch.use_deterministic_algorithms(True)
    try:
        again = torch.ops.fa3.backward(*given, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    other = torch.ops.fa3.backward(*given, **options)
    assert asked == [True, False]
    for first, second, third in zip(wanted, again, other, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third)


def test_deterministic_reaches_the_kernels(device, monkeypatch):
    q, k, v = _inputs(BackwardCase(s_q=8, s_k=8), device)
    asked = []
    run = autograd.run
    monkeypatch.setattr(autograd, "run", lambda *x: (asked.append(x[7]), run(*x))[1])
    for deterministic in (False, True):
        fa3.flash_attn_func(q, k, v, deterministic=deterministic).sum().backward()
    assert asked == [False, True]


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
@pytest.mark.parametrize(
    "case",
    [
        BackwardCase(s_q=70, s_k=200, h_q=2, h_k=2, causal=True),  # several tiles of one CTA
        BackwardCase(head_dim=192, head_dim_v=128, s_q=70, s_k=100, h_q=2, h_k=1, window=(60, 20)),
    ],
    ids=str,
)
def test_order_of_warps_and_copies_does_not_change_the_bits(case, device):
    q, k, v = (x.values for x in make_inputs(case, device))
    out, lse = attention(case, q, k, v, device)
    dout = torch.randn_like(out)
    options = {"causal": case.causal, "window_left": case.window[0], "window_right": case.window[1]}
    margin = dispatch.target_of(device).num_sms - 1

    def backward():
        given = dout, q, k, v, out, lse
        return torch.ops.fa3.backward(*given, **options, sm_margin=margin, deterministic=True)

    emulator.compare_schedules(backward, seeds=range(2))


def test_memory_is_linear_in_the_length(device):
    """Of the workspace; all else that is allocated is as large as q, k and v."""

    def numbers(length):
        x = torch.empty(1, length, 2, 64, dtype=torch.bfloat16, device=device)
        lse = torch.empty(1, 2, length, device=device)
        fields = [ops.fields(t) for t in (x, x, x, x, x, lse)]
        plan = autograd.plan_of(*fields, True, (True, True), EQUAL, None, True, -1, -1, 0, 0.0)
        return [math.prod(x[0]) for x in plan.workspace if x is not None]

    assert numbers(4096) == [2 * n for n in numbers(2048)]
    per_row = 64 + 2 + PARTS  # dQ in fp32, lse and delta, and delta in parts
    assert sum(numbers(2048)) == 2048 * 2 * per_row + 2048 // 128 * 2 * 2


def test_operations_are_counted():
    """As five products to the forward pass's two."""
    q, k, v = (
        torch.empty(2, s, h, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for s, h in ((30, 4), (50, 2), (50, 2))
    )
    with FlopCounterMode(display=False) as forward:
        out = fa3.flash_attn_func(q, k, v)
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.empty_like(out))
    assert forward.get_total_flops() == 4 * 2 * 4 * 30 * 50 * 64
    assert backward.get_total_flops() == 2.5 * forward.get_total_flops()
    for inputs, products in (((q.detach(), k, v), 4), ((q, k.detach(), v.detach()), 3)):
        with FlopCounterMode(display=False) as both:
            fa3.flash_attn_func(*inputs).sum().backward()
        assert both.get_total_flops() == (1 + products / 2) * forward.get_total_flops()


def test_packed_qkv(device):
    """Its gradient is one tensor, too."""
    qkv = torch.randn(1, 40, 4, 64, device=device).bfloat16().requires_grad_()
    out = fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=2)
    (given,) = torch.autograd.grad(out.sum(), qkv)
    parts = [x.detach().requires_grad_() for x in qkv.split([2, 1, 1], dim=2)]
    out = fa3.flash_attn_func(*parts, causal=True)
    assert torch.equal(given, torch.cat(torch.autograd.grad(out.sum(), parts), dim=2))


@pytest.mark.parametrize(
    "case",
    [
        BackwardCase(s_q=150, s_k=90, h_k=1, causal=True),  # more steps than stages
        BackwardCase(head_dim=192, head_dim_v=128, s_q=70, s_k=100, h_q=2, h_k=1, window=(60, 20)),
    ],
    ids=str,
)
def test_without_dq(case, device, monkeypatch):
    """Of some inputs, and with dO that has no memory of its own for each element."""
    q, k, v = _inputs(case, device)
    wanted = _all(case, (q, k, v), device)
    out, _ = attention(case, q.detach(), k, v.detach(), device)
    plans = []
    plan_of = autograd.plan_of
    monkeypatch.setattr(autograd, "plan_of", lambda *x: plans.append(plan_of(*x)) or plans[-1])
    out.sum().backward()  # dO is an expanded scalar
    assert torch.equal(k.grad, wanted[1]) and q.grad is None and v.grad is None
    assert plans[0].workspace[2:4] == (None, None)  # no sums, no counters


@pytest.mark.parametrize(
    "case",
    [
        BackwardCase(s_q=150, s_k=90, h_k=1, causal=True),
        BackwardCase(head_dim=192, head_dim_v=128, s_q=70, s_k=100, h_q=2, h_k=1, window=(60, 20)),
    ],
    ids=str,
)
def test_of_q_alone(case, device, monkeypatch):
    """Several tiles of one CTA, which stores nothing between them."""
    q, k, v = _inputs(case, device)
    wanted = _all(case, (q, k, v), device)[0]
    signatures = []
    made = autograd.signature_of
    monkeypatch.setattr(
        autograd, "signature_of", lambda *x: signatures.append(made(*x)) or signatures[-1]
    )
    (given,) = _all(replace(case, num_ctas=1), (q, k.detach(), v.detach()), device)
    assert not signatures[-1].with_dkv
    torch.testing.assert_close(given, wanted)


def test_of_lse_alone(device):
    case = BackwardCase(s_q=70, s_k=90, causal=True)
    q, k, v = _inputs(case, device)
    _, lse = attention(case, q, k, v, device)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    exact = reference.exact(q, k, v, causal=True)[1]
    torch.testing.assert_close(dq, torch.autograd.grad(exact.sum(), q)[0], atol=4e-3, rtol=2e-2)
    assert (dv == 0).all()


def test_gradient_of_the_sink_alone(device):
    """Of rows without a key too, whose lse is the sink; it takes part whoever needs a gradient."""
    case = BackwardCase(batch=2, s_q=150, s_k=100, h_q=4, causal=True, sink="fp32")
    inputs = [x.detach() for x in _inputs(case, device)]
    sink = case.learnable_sink(device).requires_grad_()
    out, lse = attention(case, *inputs, device, sink)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    (given,) = gradients((out, lse), [sink], dout, dlse)
    wide = [x.double() for x in inputs]
    exact = reference.exact(*wide, causal=True, precision=torch.float64, sink=sink.double())
    (wanted,) = gradients(exact, [sink], dout.double(), dlse)
    torch.testing.assert_close(given, wanted, rtol=1e-2, atol=1e-2)


def test_a_sink_of_no_weight(device):
    """At -inf it has no gradient, and rows without a key have none."""
    q, k, v = _inputs(BackwardCase(s_q=20, s_k=10), device)
    sink = torch.full((2,), -math.inf, device=device, requires_grad=True)
    out, lse = fa3.flash_attn_func(
        q, k, v, causal=True, learnable_sink=sink, return_attn_probs=True
    )
    out.sum().backward()
    assert (sink.grad == 0).all() and (q.grad[:, :10] == 0).all() and q.grad.isfinite().all()


def test_no_key_and_nothing_at_all(device):
    for sizes in ({"s_k": 0}, {"s_q": 0}, {"batch": 0}):
        case = BackwardCase(**{"s_q": 5, "s_k": 7, **sizes})
        inputs = _inputs(case, device)
        for x, gradient in zip(inputs, _all(case, inputs, device), strict=True):
            assert gradient.shape == x.shape and (gradient == 0).all()
        sink = torch.ones(2, device=device, requires_grad=True)
        _, lse = attention(case, *inputs, device, sink)
        (gradient,) = torch.autograd.grad(lse.sum(), sink)
        assert (gradient == (5 if case.s_k == 0 else gradient)).all()
        assert gradient.isfinite().all() and (case.s_k == 0 or (gradient < 5).all())


def test_in_place_changes_are_noticed(device):
    q, k, v = _inputs(BackwardCase(s_q=8, s_k=8), device)
    for changed in (q, k, v, None):
        out = fa3.flash_attn_func(q, k, v)
        with torch.no_grad():
            (out if changed is None else changed).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(torch.ones_like(out))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out": torch.zeros(1, 8, 2, 64).bfloat16()}, ["out is a tensor"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_has_no_backward_pass(changes, words, device):
    q, k, v = _inputs(BackwardCase(s_q=8, s_k=8), device)
    with pytest.raises(NotImplementedError) as caught:
        fa3.flash_attn_func(q, k, v, **{n: _on(x, device) for n, x in changes.items()})
    for word in (*words, "requires_grad", "torch.no_grad"):
        assert word in str(caught.value)


def _on(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def test_double_backward(device):
    q, k, v = _inputs(BackwardCase(s_q=8, s_k=8), device)
    out = fa3.flash_attn_func(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


BAD = {
    "dout": (lambda x: x[:, :-1], "dout has shape"),
    "dout of another dtype": (lambda x: x.half(), "dout has dtype torch.float16, expected torch.b"),
    "out": (lambda x: x.float(), "out has dtype torch.float32, expected torch.bfloat16"),
    "lse": (lambda x: x.half(), "lse has dtype torch.float16, expected torch.float32"),
    "dlse": (lambda x: x[..., :-1], "dlse has shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_the_operator(name, device):
    case = BackwardCase(s_q=8, s_k=8)
    q, k, v = (x.detach() for x in _inputs(case, device))
    out, lse = attention(case, q, k, v, device)
    given = {"dout": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": lse}
    (change, message), name = BAD[name], name.split()[0]
    with pytest.raises(ValueError, match=message):
        torch.ops.fa3.backward(**{**given, name: change(given[name])})


def test_opcheck(device):
    case = BackwardCase(s_q=20, s_k=30, causal=True)
    q, k, v = _inputs(case, device)
    torch.library.opcheck(torch.ops.fa3.forward.default, (q, k, v, None, True, -1, -1, 0))
    out, lse = (x.detach() for x in attention(case, q, k, v, device))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(
        torch.ops.fa3.backward.default, (out, q, k, v, out, lse, None, None, True)
    )
    torch.library.opcheck(torch.ops.fa3.backward.default, (out, q, k, v, out, lse, lse, 0.3))
    score = {"causal": True, "softcap": 5.0, "learnable_sink": torch.ones(2, device=device)}
    torch.library.opcheck(torch.ops.fa3.backward.default, (out, q, k, v, out, lse), score)


def test_compile_without_graph_breaks(device):
    case = BackwardCase(s_q=40, s_k=40, causal=True)

    def loss(q, k, v, sink):
        out, lse = fa3.flash_attn_func(
            q * 2, k, v, causal=True, return_attn_probs=True, learnable_sink=sink
        )
        return out.float().square().sum() + lse.sum()

    inputs = [*_inputs(case, device), torch.ones(2, device=device, requires_grad=True)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(function(*inputs), inputs) for function in (compiled, loss)]
    for given, wanted in zip(*found, strict=True):
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    case = BackwardCase(s_q=40, s_k=40, causal=True)
    inputs = _inputs(case, device)
    wanted = _all(case, inputs, device)
    out = torch.utils.checkpoint.checkpoint(
        lambda *x: fa3.flash_attn_func(*x, causal=True), *inputs, use_reentrant=use_reentrant
    )
    out.backward(torch.ones_like(out))
    for x, gradient in zip(inputs, wanted, strict=True):
        assert torch.equal(x.grad, gradient)


def test_reference(plain_torch):
    """CPU tensors without a kernel."""
    for case in (
        BackwardCase(s_q=30, s_k=50, h_q=4, h_k=2, causal=True, with_lse=True),
        BackwardCase(head_dim=192, head_dim_v=40, s_q=50, s_k=30, window=(10, 4)),
        BackwardCase(s_q=50, s_k=30, h_k=1, causal=True, softcap=5.0, sink="bf16", with_lse=True),
    ):
        check(case, torch.device("cpu"))
