"""FP8 attention in plain torch, without a kernel: all forms of scales, and the one call.

What the kernel makes of such inputs is the matter of tests/test_fp8.py.
"""

import inspect

import pytest
import torch

import fa3

from .cases import pairwise
from .fp8_calls import (
    DV,
    E4M3,
    E5M2,
    FORMS,
    H_K,
    H_Q,
    INT8,
    OUT_SHAPE,
    S_Q,
    SHIFT_SHAPE,
    B,
    D,
    descales,
    exact,
    inputs,
    real,
    shifted,
    textbook_attention,
    values,
)

pytestmark = pytest.mark.usefixtures("plain_torch")
MASKS = (False, (-1, -1)), (True, (-1, -1)), (False, (30, 20)), (True, (50, -1))


@pytest.mark.parametrize(
    "case",
    pairwise(
        {
            "dtypes": ((E4M3, E4M3, E4M3), (E4M3, E5M2, E5M2), (INT8, INT8, E4M3)),
            "q": tuple(FORMS["q_descale"]),
            "k": tuple(FORMS["k_descale"]),
            "v": tuple(FORMS["v_descale"]),
            "shift": (False, True),
            "mask": MASKS,
            "softmax_scale": (None, 0.3),
        },
        seed=3,
    ),
    ids=lambda case: "-".join(str(x) for x in case.values()),
)
def test_scales(case):
    """Bytes times scales, attended in fp64 one query at a time."""
    tensors = inputs(*case["dtypes"])
    forms = {name: case[name] for name in "qkv"}
    given = descales(**forms, unit=1 / 32 if case["dtypes"][0] == INT8 else 1.0)
    causal, window = case["mask"]
    scale = D**-0.5 if case["softmax_scale"] is None else case["softmax_scale"]
    arrays = [
        values(x, given.get(f"{name}_descale"), form)
        for x, (name, form) in zip(tensors, forms.items(), strict=True)
    ]
    if case["shift"]:
        given["v_shift"] = 3 * torch.randn(SHIFT_SHAPE)
        arrays[2] = shifted(arrays[2], given["v_shift"])
    wanted, wanted_lse = textbook_attention(*arrays, scale, causal, window)
    out, lse = fa3.flash_attn_func(
        *tensors,
        case["softmax_scale"],
        causal,
        window_size=window,
        return_attn_probs=True,
        out=torch.empty(OUT_SHAPE),
        **given,
    )
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=2e-4)  # scores reach hundreds
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=2e-5)


def test_dtypes_of_out():
    """bf16 unless told; each is the fp32 result, rounded once."""
    tensors, given = inputs(), descales("128", "64", "64")
    whole = fa3.flash_attn_func(*tensors, **given, out=torch.empty(OUT_SHAPE))
    default = fa3.flash_attn_func(*tensors, **given)
    assert default.dtype == torch.bfloat16
    assert torch.equal(default, whole.bfloat16())
    half = torch.empty(OUT_SHAPE, dtype=torch.float16)
    assert torch.equal(fa3.flash_attn_func(*tensors, **given, out=half), whole.half())


def test_any_strides():
    tensors, given = inputs(), descales("128", "head", "channels")
    wanted = fa3.flash_attn_func(*tensors, **given)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    gaps = [torch.cat([x, x], dim=3)[..., : x.shape[3]] for x in tensors]
    odd = [torch.cat([x, x[..., :8]], dim=3)[..., : x.shape[3]] for x in tensors]
    for views in (heads_first, gaps, odd):
        spread = {name: torch.stack([x, x], dim=-1)[..., 1] for name, x in given.items()}
        assert torch.equal(fa3.flash_attn_func(*views, **spread), wanted)


@pytest.mark.parametrize(("s_q", "s_k"), [(0, 9), (9, 0), (1, 1)])
def test_short(s_q, s_k):
    tensors = inputs(s_q=s_q, s_k=s_k)
    given = {
        "q_descale": torch.ones(B, H_Q, min(s_q, 1)),
        "k_descale": torch.ones(B, H_K, min(s_k, 1)),
        "v_descale": torch.full((B, H_K, 1, DV), 2.0),
    }
    shift = torch.rand(SHIFT_SHAPE)
    out, lse = fa3.flash_attn_func(*tensors, **given, v_shift=shift, return_attn_probs=True)
    assert out.shape == (B, s_q, H_Q, DV)
    assert lse.shape == (B, H_Q, s_q)
    if s_k == 0:
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    elif s_k == 1:
        values = 2 * tensors[2].float() + shift[:, None]
        assert torch.equal(out, values.bfloat16().repeat_interleave(H_Q // H_K, dim=2))


def _rms(x) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "bound", "lse_bound"),
    [
        ({}, 0.06, 0.1),
        ({"softmax_scale": 0.2, "causal": True}, 0.08, 0.15),
        ({"hadamard": False, "v_per_channel": True}, 0.06, 0.1),
        ({"block_scales": False}, 0.06, 0.1),
        ({"rows_per_block": 64}, 0.06, 0.1),
        ({"qk_dtype": INT8}, 0.04, 0.03),
        ({"qk_dtype": INT8, "smooth_v": False}, 0.04, 0.03),
    ],
    ids=str,
)
def test_fp8_of_16_bit_inputs(options, bound, lse_bound, dtype):
    """Within FP8's rounding of the attention of the inputs, lse of the keys as they are."""
    q, k, v = real(dtype, offset=2.0)
    out, lse = fa3.flash_attn_fp8_func(q, k, v, return_attn_probs=True, **options)
    scale = options.get("softmax_scale", q.shape[-1] ** -0.5)
    wanted, wanted_lse = exact(q, k, v, scale, options.get("causal", False))
    assert (out.dtype, out.shape) == (dtype, (B, S_Q, H_Q, DV))
    assert _rms(out - wanted) <= bound * _rms(wanted)
    assert (lse - wanted_lse).abs().max() <= lse_bound


def test_lse_is_that_of_the_keys_as_given():
    """What smooth_k takes from the scores is much more than lse may be off by."""
    q, k, v = real(offset=2.0)
    parts = fa3.quantize_fp8(q, k, v, smooth_k=True, hadamard=True)
    given = dict(zip(FORMS, parts[3:6], strict=True))
    _, smoothed = fa3.flash_attn_func(*parts[:3], **given, return_attn_probs=True)
    _, lse = fa3.flash_attn_fp8_func(q, k, v, return_attn_probs=True)
    assert (smoothed - lse).abs().max() > 1
    torch.testing.assert_close(lse, smoothed + parts.lse_shift * 64**-0.5)


@pytest.mark.parametrize("smooth_k", [False, True])
def test_both_steps_apart(smooth_k):
    """With the same options, and what Fp8Inputs hands out, they are the one call."""
    q, k, v = real(offset=2.0)
    wanted = fa3.flash_attn_fp8_func(q, k, v, hadamard=False, smooth_k=smooth_k)
    x = fa3.quantize_fp8(q, k, v, smooth_k=smooth_k)
    assert torch.equal(fa3.flash_attn_func(x.q, x.k, x.v, **x.scales), wanted)
    assert set(x.scales) == {*FORMS, "v_shift"}
    assert all(scale is getattr(x, name) for name, scale in x.scales.items())


def test_defaults_that_both_functions_share():
    one_call, quantisation = (
        inspect.signature(function).parameters
        for function in (fa3.flash_attn_fp8_func, fa3.quantize_fp8)
    )
    shared = {name for name in one_call if name in quantisation} - {"q", "k", "v"}
    differ = {name for name in shared if one_call[name].default != quantisation[name].default}
    assert "smooth_v" in shared
    assert differ == {"hadamard", "smooth_k"}  # quantize_fp8 says why


def test_what_the_options_are_for():
    """smooth_k: keys with a common offset in e4m3; smooth_v: values with one, in int8 as k and q
    would else hide it; hadamard: an outlying channel in int8.
    """
    q, k, v = real(offset=4.0)
    wanted, _ = exact(q, k, v, 64**-0.5, False)
    with_it, without = (
        _rms(fa3.flash_attn_fp8_func(q, k, v, smooth_k=on) - wanted) for on in (True, False)
    )
    assert with_it < 0.6 * without
    q, k, v = real()
    v += 4 * torch.randn(DV)
    wanted, _ = exact(q, k, v, 64**-0.5, False)
    with_it, without = (
        _rms(
            fa3.flash_attn_fp8_func(q, k, v, smooth_v=on, qk_dtype=INT8, out=v.new_empty(OUT_SHAPE))
            - wanted
        )
        for on in (True, False)
    )
    assert with_it < 0.7 * without
    q, k, v = real()
    q[..., 5], k[..., 5] = q[..., 5] / 20, k[..., 5] * 20
    wanted, _ = exact(q, k, v, 64**-0.5, False)
    with_it, without = (
        _rms(fa3.flash_attn_fp8_func(q, k, v, hadamard=on, qk_dtype=INT8) - wanted)
        for on in (True, False)
    )
    assert with_it < 0.6 * without


def test_rows_without_keys():
    q, k, v = real(s_q=20, s_k=10)
    out, lse = fa3.flash_attn_fp8_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out[:, :10], torch.zeros_like(out[:, :10]))
    assert torch.equal(lse[:, :, :10], torch.full_like(lse[:, :, :10], -torch.inf))
    assert out[:, 10:].isfinite().all() and lse[:, :, 10:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_into_out(dtype):
    q, k, v = real(dtype)
    out = torch.empty(OUT_SHAPE, dtype=dtype)
    assert fa3.flash_attn_fp8_func(q, k, v, out=out) is out
    assert torch.equal(out, fa3.flash_attn_fp8_func(q, k, v))


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ValueError, ["q", "48", "power of two", "hadamard=True"], {"d": 48}),
        (ValueError, ["q", "40", "multiple of 16"], {"d": 40, "hadamard": False}),
        (TypeError, ["q", "float8_e4m3fn", "float16", "bfloat16"], {"dtype": E4M3}),
        (TypeError, ["qk_dtype", "float8_e5m2", "int8"], {"qk_dtype": E5M2}),
        (TypeError, ["smooth_k", "1"], {"smooth_k": 1}),
        (TypeError, ["smooth_v", "None"], {"smooth_v": None}),
        (TypeError, ["window_size", "5", "pair"], {"window_size": 5}),
        (TypeError, ["window_size", "left", "[5]", "int"], {"window_size": ([5], 0)}),
        (TypeError, ["dropout_p", "no dropout"], {"dropout_p": 0.0}),
        (TypeError, ["rows_per_block", "128.0", "int"], {"rows_per_block": 128.0}),
        (ValueError, ["softmax_scale", "-1"], {"softmax_scale": -1.0}),
        (TypeError, ["sm_margin", "0.5"], {"sm_margin": 0.5}),
        (TypeError, ["q", "list", "torch.Tensor"], {"q": [1.0]}),
        (ValueError, ["v", "length", "9", "200"], {"v": torch.zeros(B, 9, H_K, DV).bfloat16()}),
        (NotImplementedError, ["k", "requires_grad"], {"grad": "k"}),
        (TypeError, ["out", "list"], {"out": [1.0]}),
        (ValueError, ["out", "shape", "48"], {"out": torch.zeros(B, S_Q, H_Q, 64).bfloat16()}),
        (ValueError, ["out", "float32", "bfloat16"], {"out": torch.zeros(OUT_SHAPE)}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_of_the_one_call(error, words, changes, monkeypatch):
    """Refused before anything is quantised."""
    launched = []
    monkeypatch.setattr(fa3.quantize_plan, "_kernel", lambda *_: lambda *x: launched.append(x))
    changes = dict(changes)
    make = {name: changes.pop(name) for name in ("d", "dtype") if name in changes}
    given = dict(zip("qkv", real(**make), strict=True))
    if grad := changes.pop("grad", None):
        given[grad].requires_grad_()
    with pytest.raises(error) as caught:
        fa3.flash_attn_fp8_func(**{**given, **changes})
    for word in words:
        assert word in str(caught.value)
    assert launched == []
