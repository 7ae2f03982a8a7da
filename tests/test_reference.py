"""The chain of trust: textbook -> torch reference of the tests -> fa3's own CPU path."""

import numpy as np
import pytest
import torch

from fa3.call.problem import Layout, Options, Problem
from fa3.call.scales import NO_DESCALES
from fa3.kernels.signature import Signature
from fa3.ops import NO_LENGTHS, WHOLE
from fa3.reference import attention as cpu

from . import reference, textbook
from .accuracy import assert_accurate, assert_lse

MASKS = [(False, (-1, -1)), (True, (-1, -1)), (False, (3, 2)), (True, (2, -1)), (False, (-1, 1))]
MASKS += [(False, (0, 0)), (False, (4, -1))]
SINK = torch.tensor([0.5, -3.0, -torch.inf, 7.0])
SCORES = [(0.0, None), (1.5, None), (0.0, SINK), (0.8, torch.stack([SINK, SINK.flip(0)]))]
LENGTHS = [(5, 5), (3, 9), (9, 3), (1, 7), (7, 1)]


def _inputs(s_q, s_k, h_q=4, h_k=2, d=8, dv=16, dtype=torch.float32):
    q = torch.randn(2, s_q, h_q, d, dtype=dtype)
    return q, torch.randn(2, s_k, h_k, d, dtype=dtype), torch.randn(2, s_k, h_k, dv, dtype=dtype)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_torch_reference_agrees_with_textbook(lengths, causal, window):
    q, k, v = _inputs(*lengths)
    left, right = window[0], 0 if causal else window[1]
    for softcap, sink in SCORES:
        out, lse = reference.exact(q, k, v, 0.4, causal, window, softcap=softcap, sink=sink)
        sinks = None if sink is None else sink.expand(2, 4).double().numpy()
        for b in range(2):
            arrays = [x[b].double().numpy() for x in (q, k, v)]
            of_entry = None if sinks is None else sinks[b]
            wanted, wanted_lse = textbook.multi_head_attention(
                *arrays, 0.4, left, right, softcap, of_entry
            )
            np.testing.assert_allclose(out[b].numpy(), wanted, atol=2e-6)
            np.testing.assert_allclose(lse[b].numpy(), wanted_lse, atol=2e-6)


def test_textbook_forms_agree():
    """Self, cross and causal attention are special cases of the window."""
    q, k, v = (x[0, :, 0].double().numpy() for x in _inputs(6, 6))
    for given, wanted in (
        (textbook.self_attention(q, k, v, 0.5), textbook.window_attention(q, k, v, 0.5)),
        (textbook.cross_attention(q[:2], k, v, 0.5), textbook.window_attention(q[:2], k, v, 0.5)),
        (textbook.causal_attention(q, k, v, 0.5), textbook.window_attention(q, k, v, 0.5, 9, 0)),
    ):
        np.testing.assert_allclose(given[0], wanted[0])
        np.testing.assert_allclose(given[1], wanted[1])


def test_default_scale():
    q, k, v = _inputs(4, 4)
    torch.testing.assert_close(reference.exact(q, k, v), reference.exact(q, k, v, 8**-0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_baseline_differs_by_rounding_only(dtype):
    q, k, v = (x.to(dtype) for x in _inputs(30, 40, d=64, dv=64))
    exact, _ = reference.exact(q, k, v, causal=True)
    error = (reference.baseline(q, k, v, causal=True).float() - exact.float()).abs().max()
    assert 0 < error < 30 * torch.finfo(dtype).eps


def _cpu_forward(q, k, v, causal, window, scale):
    options = Options(scale, causal, *window)
    problem = Problem.of(Layout.of(q), Layout.of(k), Layout.of(v), options)
    run = cpu.bind(problem.signature)
    out, lse = q.new_empty(problem.out_shape), torch.empty(problem.lse_shape)
    run((q, k, v, out, lse, *NO_DESCALES, None, *NO_LENGTHS, None, *problem.scalars, 0, *WHOLE))
    return out, lse


@pytest.mark.parametrize("lengths", [(50, 50), (33, 70), (70, 33), (1, 40)])
@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_path(lengths, causal, window, dtype, monkeypatch):
    """fa3.reference.attention, in blocks of a few rows, against the reference of the tests."""
    monkeypatch.setattr(cpu, "SCORE_BYTES", 4 * 2 * 4 * lengths[1] * 7)
    q, k, v = (x.to(dtype) for x in _inputs(*lengths, d=64, dv=40))
    out, lse = _cpu_forward(q, k, v, causal, window, None)
    exact, exact_lse = reference.exact(q, k, v, None, causal, window)
    baseline = reference.baseline(q, k, v, None, causal, window)
    assert_accurate("out", out, exact, baseline)
    assert_lse("lse", lse, exact_lse)


def test_cpu_path_takes_any_strides():
    q, k, v = (x.half() for x in _inputs(20, 20, d=64, dv=64))
    wanted = _cpu_forward(q, k, v, True, (-1, -1), None)
    for order in ((0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0)):
        back = [order.index(i) for i in range(4)]
        views = (x.permute(order).contiguous().permute(back) for x in (q, k, v))
        given = _cpu_forward(*views, True, (-1, -1), None)
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_signature_is_all_that_the_cpu_path_is_bound_to():
    signature = Signature("bf16", 64, 64, "causal")
    assert cpu.bind(signature).args == (signature,)
