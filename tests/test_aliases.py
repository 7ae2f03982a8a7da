"""packaging/flash-attn-3: the names of FlashAttention-3, and programs that look for them."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import fa3

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "packaging" / "flash-attn-3"

# Of FlashAttention-3 at 0251105, hopper/flash_attn_interface.py: names, order and defaults.
SIGNATURES = {
    "flash_attn_func": (
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
        "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
        "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
        "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_qkvpacked_func": (
        "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, "
        "num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        "return_softmax_lse=False"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
        "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
        "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, "
        "pack_gqa=None, sm_margin=0"
    ),
    "_flash_attn_forward": (
        "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
        "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, "
        "leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, "
        "k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, "
        "window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
    ),
    "_flash_attn_backward": (
        "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
        "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
        "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, deterministic=False, sm_margin=0"
    ),
}
# Of hopper/flash_api.cpp there: what xformers compares.
OPERATORS = {
    "fwd": (
        "q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k "
        "max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin "
        "seqlens_rotary q_descale k_descale v_descale softmax_scale is_causal window_size_left "
        "window_size_right attention_chunk softcap is_rotary_interleaved scheduler_metadata "
        "num_splits pack_gqa sm_margin"
    ),
    "bwd": (
        "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k seqused_q seqused_k "
        "max_seqlen_q max_seqlen_k softmax_scale is_causal window_size_left window_size_right "
        "softcap deterministic sm_margin"
    ),
    "fwd_combine": "out_partial lse_partial out out_dtype",
    "get_scheduler_metadata": (
        "batch_size max_seqlen_q max_seqlen_k num_heads num_heads_k headdim headdim_v qkv_dtype "
        "seqused_k cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q leftpad_k page_size "
        "max_seqlen_k_new is_causal window_size_left window_size_right attention_chunk "
        "has_softcap num_splits pack_gqa sm_margin"
    ),
}


@pytest.fixture(scope="module")
def interface():
    """flash_attn_interface; its operators stay registered in this process."""
    sys.path.insert(0, str(PROJECT / "src"))
    try:
        yield importlib.import_module("flash_attn_interface")
    finally:
        sys.path.remove(str(PROJECT / "src"))
        for name in [
            x for x in sys.modules if x.startswith(("flash_attn_interface", "flash_attn_3"))
        ]:
            del sys.modules[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(interface, name):
    """Theirs comes first and in order; more, if any, is by keyword alone."""
    given = inspect.signature(getattr(interface, name)).parameters.values()
    ordered = [x for x in given if x.kind is x.POSITIONAL_OR_KEYWORD]
    found = ", ".join(str(x.replace(annotation=x.empty)) for x in ordered)
    assert found == SIGNATURES[name]


@pytest.mark.parametrize("name", OPERATORS)
def test_schemas(interface, name):
    schema = getattr(torch.ops.flash_attn_3, name).default._schema
    assert [x.name for x in schema.arguments] == OPERATORS[name].split()
    assert len(schema.returns) == {"fwd": 4, "bwd": 5, "fwd_combine": 2}.get(name, 1)


def test_the_package_has_the_modules_that_programs_import(interface):
    package = importlib.import_module("flash_attn_3.flash_attn_interface")
    assert package.flash_attn_func is interface.flash_attn_func is fa3.flash_attn_func
    assert package._flash_attn_forward is interface._flash_attn_forward
    assert importlib.import_module("flash_attn_3._C")


def inputs(*shape, dtype=torch.half):
    return [torch.randn(*shape).to(dtype) for _ in range(3)]


def test_forward_of_equal_lengths(interface, plain_torch):
    """As TransformerEngine calls it: 23 by position, the rest by name."""
    q, k, v = inputs(2, 30, 4, 64)
    options = {"window_size_left": 9, "window_size_right": 0, "softcap": 3.0, "sm_margin": 1}
    found = interface._flash_attn_forward(q, k, v, *[None] * 20, softmax_scale=0.2, **options)
    wanted = fa3.flash_attn_func(
        q, k, v, 0.2, window_size=(9, 0), softcap=3.0, return_attn_probs=True
    )
    check_forward(found, wanted)
    raw = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=0.2, **options)
    check_forward(raw, wanted)


def check_forward(found, wanted):
    out, lse, *partial = found
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    assert [x.numel() for x in partial] == [0, 0]


def test_forward_into_out(interface, plain_torch):
    q, k, v = inputs(1, 12, 2, 32)
    out = torch.zeros_like(q)
    found = torch.ops.flash_attn_3.fwd(q, k, v, out=out, is_causal=True)
    assert found[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, fa3.flash_attn_func(q, k, v, causal=True))


def test_forward_of_packed_sequences(interface, plain_torch):
    q, k, v = inputs(20, 2, 64)
    ends = torch.tensor([0, 13, 20], dtype=torch.int32)
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 13, "max_seqlen_k": 13}
    wanted = fa3.flash_attn_varlen_func(q, k, v, **lengths, causal=True, return_attn_probs=True)
    check_forward(interface._flash_attn_forward(q, k, v, **lengths, causal=True), wanted)
    check_forward(torch.ops.flash_attn_3.fwd(q, k, v, **lengths, is_causal=True), wanted)


def test_forward_with_a_cache_in_pages(interface, plain_torch):
    """It appends, rotates and attends; rotary's default differs between function and operator."""
    q, new_k, new_v = inputs(2, 3, 2, 64)
    caches = [torch.randn(4, 16, 2, 64).half() for _ in range(2)]
    angles = torch.rand(40, 16).half()
    given = {
        "page_table": torch.tensor([[2, 0], [1, 3]], dtype=torch.int32),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
    }
    seqlens = torch.tensor([17, 5], dtype=torch.int32)
    results = []
    for call in (
        lambda k, v: fa3.flash_attn_with_kvcache(
            q, k, v, new_k, new_v, cache_seqlens=seqlens, causal=True, rotary_interleaved=False,
            return_softmax_lse=True, **given,
        ),
        lambda k, v: torch.ops.flash_attn_3.fwd(
            q, k, v, new_k, new_v, seqused_k=seqlens, is_causal=True, **given
        )[:2],
        lambda k, v: interface._flash_attn_forward(
            q, k, v, new_k, new_v, seqused_k=seqlens, causal=True, rotary_interleaved=False, **given
        )[:2],
    ):  # fmt: skip
        copies = [x.clone() for x in caches]
        results.append([*call(*copies), *copies])
    for found in results[1:]:
        for x, wanted in zip(found, results[0], strict=True):
            assert torch.equal(x, wanted)
    assert not torch.equal(results[0][2], caches[0])


def test_backward_fills_the_gradients(interface, plain_torch):
    q, k, v = inputs(2, 20, 2, 64, dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = fa3.flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(out, leaves, dout)
    results = [x.detach() for x in (out, lse)]
    filled = [torch.full_like(x, 7) for x in (q, k, v)]
    given = dict(zip(("dq", "dk", "dv"), filled, strict=True))
    found = interface._flash_attn_backward(dout, q, k, v, *results, **given, is_causal=True)
    assert found.numel() == 0
    again = [torch.full_like(x, 7) for x in (q, k, v)]
    torch.ops.flash_attn_3.bwd(dout, q, k, v, *results, *again, is_causal=True)
    for x, y, gradient in zip(filled, again, wanted, strict=True):
        assert torch.equal(x, gradient) and torch.equal(y, gradient)


def test_gradients_flow_through_the_private_forward(interface, plain_torch):
    leaves = [x.requires_grad_() for x in inputs(1, 9, 2, 64)]
    out, *_ = interface._flash_attn_forward(*leaves, causal=True)
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    out = fa3.flash_attn_func(*leaves, causal=True)
    wanted = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_combine_and_metadata(interface, plain_torch):
    parts, lse = torch.randn(3, 1, 5, 2, 32), torch.randn(3, 1, 5, 2)
    found = torch.ops.flash_attn_3.fwd_combine(parts, lse, out_dtype=torch.half)
    wanted = fa3.flash_attn_combine(parts, lse, out_dtype=torch.half)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    for made in (
        interface.get_scheduler_metadata(2, 1, 8, 2, 2, 64, lengths),
        torch.ops.flash_attn_3.get_scheduler_metadata(
            2, 1, 8, 2, 2, 64, 64, torch.half, lengths, num_splits=2
        ),
    ):
        assert (made.dtype, made.numel()) == (torch.int32, 0)


def test_what_is_not_there_is_refused(interface, plain_torch):
    q, k, v = inputs(1, 9, 2, 64)
    with pytest.raises(NotImplementedError, match="qv"):
        interface._flash_attn_forward(q, k, v, qv=q)
    with pytest.raises(NotImplementedError, match="seqused_q is a tensor"):
        table = torch.zeros(1, 1, dtype=torch.int32)
        interface._flash_attn_forward(q, k, v, seqused_q=table[0], page_table=table)


def test_older_names(interface, plain_torch):
    """As yunchang 0.6.4 calls the private functions."""
    q, k, v = inputs(2, 20, 2, 64, dtype=torch.bfloat16)
    window = {"window_size_left": 5, "window_size_right": 2}
    wanted = interface._flash_attn_forward(q, k, v, **window)
    out = torch.zeros_like(q)
    found = interface._flash_attn_forward(q=q, k=k, v=v, out=out, window_size=(5, 2))
    assert found[0].data_ptr() == out.data_ptr()
    check_forward(found, wanted[:2])
    dout = torch.randn_like(q)
    gradients = []
    for given in (
        window,
        {"window_size": (5, 2)},
        {"is_causal": True},
        {"causal": True, "window_size": (-1, -1)},
    ):
        filled = [torch.zeros_like(x) for x in (q, k, v)]
        names = dict(zip(("dq", "dk", "dv"), filled, strict=True))
        interface._flash_attn_backward(dout, q, k, v, *wanted[:2], **names, **given)
        gradients.append(filled)
    by_window, of_window, by_causal, of_causal = gradients
    assert all(torch.equal(x, y) for x, y in zip(by_window, of_window, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(by_causal, of_causal, strict=True))
    assert not torch.equal(by_window[0], by_causal[0])


def test_two_of_them_do_not_mix(interface):
    with pytest.raises(ImportError, match="torch.ops.flash_attn_3 is registered already"):
        importlib.import_module("flash_attn_3._C")._register()


def test_fa3_never_brings_it():
    assert not re.search("flash-attn-3", (ROOT / "pyproject.toml").read_text())
