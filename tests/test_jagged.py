"""Nested tensors of layout torch.jagged, which are packed sequences; and torch.autocast."""

import pytest
import torch

import fa3

LENGTHS = (20, 0, 33)


def _nested(d=32, lengths=LENGTHS, h=4, requires_grad=True):
    parts = [torch.randn(n, h, d).bfloat16() for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=requires_grad)


def _values_like(k, d):
    """Of the same sequences, with another head dim."""
    values = torch.randn(*k.values().shape[:2], d).bfloat16().requires_grad_()
    return torch.nested.nested_tensor_from_jagged(values, k.offsets())


@pytest.mark.parametrize("compiled", [False, True])
def test_jagged(compiled, plain_torch):
    q, k = _nested(), _nested(h=2)
    v = _values_like(k, 16)

    def attend(q, k, v):
        sink = torch.zeros(4)
        return fa3.flash_attn_func(
            q, k, v, causal=True, learnable_sink=sink, return_attn_probs=True
        )

    given = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    out, lse = given(q, k, v)
    values = [x.values().detach().requires_grad_() for x in (q, k, v)]
    cu_seqlens = q.offsets().int()
    wanted, wanted_lse = fa3.flash_attn_varlen_func(
        *(*values, cu_seqlens, cu_seqlens, 40, 40),
        causal=True,
        learnable_sink=torch.zeros(4),
        return_attn_probs=True,
    )
    assert out.is_nested
    assert out.shape[0] == len(LENGTHS)
    assert torch.equal(out.offsets(), q.offsets())
    assert torch.equal(out.values(), wanted)
    assert torch.equal(lse, wanted_lse)
    slope = torch.randn_like(wanted)
    found = torch.autograd.grad(out.values(), (q, k, v), slope)
    expected = torch.autograd.grad(wanted, values, slope)
    assert all(torch.equal(x.values(), y) for x, y in zip(found, expected, strict=True))


def test_other_lengths_of_keys(plain_torch):
    q, k = _nested(), _nested(lengths=(5, 7, 40))
    v = _values_like(k, 32)
    out = fa3.flash_attn_func(q, k, v)
    for x, y, z, found in zip(*(x.unbind() for x in (q, k, v, out)), strict=True):
        wanted = fa3.flash_attn_func(x[None], y[None], z[None])[0]
        torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match=r"v has lengths j\d+ but k has j\d+, expected one tensor"):
        fa3.flash_attn_func(q, k, q)


def test_bad_jagged():
    q = _nested()
    with pytest.raises(ValueError, match=r"q is nested with 4 dimensions, of which 2 is ragged"):
        fa3.flash_attn_func(*[q.transpose(1, 2)] * 3)
    with pytest.raises(ValueError, match="out is given but q is a nested tensor"):
        fa3.flash_attn_func(q, q, q, out=torch.zeros(53, 4, 32).bfloat16())
    dense = torch.zeros(2, 40, 4, 32).bfloat16()
    starts, lengths = torch.tensor([0, 5]), torch.tensor([10, 20])
    holes = torch.nested.narrow(dense, 1, starts, lengths, layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="q is nested with rows that belong to no"):
        fa3.flash_attn_func(holes, holes, holes)


def _dense(dtype=torch.float32):
    return [torch.randn(1, 30, h, 32).to(dtype).requires_grad_() for h in (4, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_fp32(dtype, plain_torch):
    given = _dense()
    cast = [x.detach().to(dtype).requires_grad_() for x in given]
    with torch.autocast("cpu", dtype):
        out = fa3.flash_attn_func(*given, causal=True)
        mixed = fa3.flash_attn_func(cast[0], *given[1:], causal=True)
        in_fp8 = fa3.flash_attn_fp8_func(*(x.detach() for x in given), causal=True)
    wanted = fa3.flash_attn_func(*cast, causal=True)
    assert out.dtype == dtype
    assert torch.equal(out, wanted)
    assert torch.equal(mixed, wanted)
    assert torch.equal(in_fp8, fa3.flash_attn_fp8_func(*(x.detach() for x in cast), causal=True))
    slope = torch.randn_like(wanted)
    found = torch.autograd.grad(out, given, slope)
    expected = torch.autograd.grad(wanted, cast, slope)
    assert all(torch.equal(x, y.float()) for x, y in zip(found, expected, strict=True))


def test_autocast_leaves_16_bits_and_no_autocast_fp32(plain_torch):
    half = _dense(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fa3.flash_attn_func(*half).dtype == torch.float16
    for enabled in (None, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(enabled)):
            with pytest.raises(TypeError, match="q has dtype torch.float32"):
                fa3.flash_attn_func(*_dense())
