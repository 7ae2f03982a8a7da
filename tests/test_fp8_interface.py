"""FP8 attention on CPU tensors without a kernel: scales, operators and the call that quantises.

What the kernel makes of the same inputs is the matter of tests/test_fp8.py.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fa3
from fa3 import dispatch, ops

from . import textbook
from .cases import pairwise

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
B, S_Q, S_K, H_Q, H_K, D, DV = 2, 140, 200, 4, 2, 32, 48
SCALES = {  # argument -> form -> shape, rows per scale
    "q_descale": {"none": None, "head": ((B, H_K), None), "blocks": ((B, H_Q, 2), 128)},
    "k_descale": {
        "none": None,
        "head": ((B, H_K), None),
        "128": ((B, H_K, 2), 128),
        "64": ((B, H_K, 4), 64),
    },
    "v_descale": {
        "none": None,
        "head": ((B, H_K), None),
        "128": ((B, H_K, 2), 128),
        "64": ((B, H_K, 4), 64),
        "channels": ((B, H_K, 1, DV), None),
    },
}
MASKS = (False, (-1, -1)), (True, (-1, -1)), (False, (30, 20)), (True, (50, -1))


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch):
    """CPU tensors are computed in plain torch, whatever FA3_CPU says."""
    target = dispatch.Target("reference", "CPU", (0, 0), 1)
    monkeypatch.setattr(dispatch, "target_of", lambda device: target)
    plans = ops.plan_of, ops.plan_fp8_of
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def numbers(*shape, dtype):
    """About normal, once descaled as `descales` does."""
    x = torch.randn(shape)
    return (32 * x).clamp(-127, 127).to(INT8) if dtype == INT8 else x.to(dtype)


def inputs(q=E4M3, k=E4M3, v=E4M3, s_q=S_Q, s_k=S_K):
    return (
        numbers(B, s_q, H_Q, D, dtype=q),
        numbers(B, s_k, H_K, D, dtype=k),
        numbers(B, s_k, H_K, DV, dtype=v),
    )


def descales(q="none", k="none", v="none", unit=1.0):
    """Those of q and k are around `unit`."""
    given = {}
    for name, form, around in (("q_descale", q, unit), ("k_descale", k, unit), ("v_descale", v, 1)):
        if form != "none":
            given[name] = around * (torch.rand(SCALES[name][form][0]) + 0.5)
    return given


def values(x, descale=None, block=None):
    """Bytes (b, s, h, d) times their scales, in fp64."""
    x = x.to(torch.float64).numpy()
    if descale is None:
        return x
    scale = descale.double().numpy()
    if scale.ndim == 2:  # per head of k
        scale = np.repeat(scale, x.shape[2] // scale.shape[1], axis=1)[:, None, :, None]
    elif scale.ndim == 3:
        scale = np.repeat(scale, block, axis=2)[:, :, : x.shape[1]].transpose(0, 2, 1)[..., None]
    else:
        scale = scale.transpose(0, 2, 1, 3)
    return x * scale


def textbook_attention(q, k, v, scale, causal=False, window=(-1, -1)):
    left, right = window[0], 0 if causal else window[1]
    pairs = [
        textbook.multi_head_attention(*arrays, scale, left, right)
        for arrays in zip(q, k, v, strict=True)
    ]
    out, lse = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    return out, lse


@pytest.mark.parametrize(
    "case",
    pairwise(
        {
            "dtypes": ((E4M3, E4M3, E4M3), (E4M3, E5M2, E5M2), (INT8, INT8, E4M3)),
            "q": tuple(SCALES["q_descale"]),
            "k": tuple(SCALES["k_descale"]),
            "v": tuple(SCALES["v_descale"]),
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
        values(x, given.get(f"{name}_descale"), (SCALES[f"{name}_descale"][form] or (0, 0))[1])
        for x, (name, form) in zip(tensors, forms.items(), strict=True)
    ]
    wanted, wanted_lse = textbook_attention(*arrays, scale, causal, window)
    out, lse = fa3.flash_attn_func(
        *tensors,
        case["softmax_scale"],
        causal,
        window_size=window,
        return_attn_probs=True,
        out=torch.empty(B, S_Q, H_Q, DV),
        **given,
    )
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=2e-5)


def test_dtypes_of_out():
    """bf16 unless told; each is the fp32 result, rounded once."""
    tensors, given = inputs(), descales("blocks", "64", "64")
    exact = fa3.flash_attn_func(*tensors, **given, out=torch.empty(B, S_Q, H_Q, DV))
    default = fa3.flash_attn_func(*tensors, **given)
    assert default.dtype == torch.bfloat16
    assert torch.equal(default, exact.bfloat16())
    half = torch.empty(B, S_Q, H_Q, DV, dtype=torch.float16)
    assert torch.equal(fa3.flash_attn_func(*tensors, **given, out=half), exact.half())


def test_any_strides():
    tensors, given = inputs(), descales("blocks", "head", "channels")
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
    out, lse = fa3.flash_attn_func(*tensors, **given, return_attn_probs=True)
    assert out.shape == (B, s_q, H_Q, DV)
    assert lse.shape == (B, H_Q, s_q)
    if s_k == 0:
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    elif s_k == 1:
        group = H_Q // H_K
        assert torch.equal(out, 2 * tensors[2].bfloat16().repeat_interleave(group, dim=2))


GIVEN = ("blocks", "64", "128")


def arguments():
    given = descales(*GIVEN)
    return *inputs(), *given.values()


def _model(q, k, v, q_descale, k_descale, v_descale):
    out, lse = fa3.flash_attn_func(
        q,
        k,
        v,
        causal=True,
        q_descale=q_descale * 2,
        k_descale=k_descale,
        v_descale=v_descale,
        return_attn_probs=True,
        check_scales=True,
    )
    return out + 1, lse


def test_operator_agrees_with_eager():
    q, k, v, *scales = arguments()
    wanted = fa3.flash_attn_func(
        q, k, v, None, True, None, *scales, window_size=(50, 0), return_attn_probs=True
    )
    given = torch.ops.fa3.forward_fp8(q, k, v, *scales, None, True, 50, 0)
    for a, b in zip(given, wanted, strict=True):
        assert torch.equal(a, b)


# without test_schema, which compares inputs by torch.allclose and fails for every FP8 tensor
OPCHECKS = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"


def test_opcheck():
    q, k, v, *scales = arguments()
    operators = torch.ops.fa3.forward_fp8.default, torch.ops.fa3.forward_fp8_out.default
    for rest in ((*scales, None, True, -1, -1, 0, True), (None, None, None, 0.3, False, 20, 5, 0)):
        out = torch.empty(B, S_Q, H_Q, DV, dtype=torch.float16)
        for operator, tensors in zip(operators, ((q, k, v), (q, k, v, out)), strict=True):
            torch.library.opcheck(operator, (*tensors, *rest), test_utils=OPCHECKS)


def test_operators_change_only_out():
    """What test_schema would look at."""
    q, k, v, *scales = arguments()
    out = torch.empty(B, S_Q, H_Q, DV)
    given = q, k, v, *scales
    before = [x.clone() for x in given]
    lse = torch.ops.fa3.forward_fp8_out(q, k, v, out, *scales, None, True)
    result, _ = torch.ops.fa3.forward_fp8(*given, None, True)
    for x, copy in zip(given, before, strict=True):
        assert torch.equal(x.view(torch.uint8), copy.view(torch.uint8))
    memory = {x.untyped_storage().data_ptr() for x in (*given, out)}
    assert lse.untyped_storage().data_ptr() not in memory
    assert result.untyped_storage().data_ptr() not in memory


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(backend):
    given = arguments()
    compiled = torch.compile(_model, fullgraph=True, backend=backend)
    for a, b in zip(compiled(*given), _model(*given), strict=True):
        assert torch.equal(a, b)
    given[4][0, 0, 3] = -1.0
    with pytest.raises(ValueError, match=r"k_descale is -1.0 at \(0, 0, 3\)"):
        compiled(*given)


def test_compile_with_out_and_without_scales():
    def model(q, k, v, out):
        return fa3.flash_attn_func(q, k, v, causal=True, out=out) * 2

    given = inputs()
    out = torch.zeros(B, S_Q, H_Q, DV)
    doubled = torch.compile(model, fullgraph=True, backend="aot_eager")(*given, out)
    wanted = fa3.flash_attn_func(*given, causal=True, out=torch.empty_like(out))
    assert torch.equal(out, wanted)
    assert torch.equal(doubled, wanted * 2)


def _recorder(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def test_compile_with_dynamic_lengths():
    """One graph serves other lengths, with as many blocks as they have."""
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(_model, fullgraph=True, backend=_recorder(graphs), dynamic=True)
    for s_q, s_k in ((700, 600), (300, 500), (140, 1100)):  # first: no two of the counts are equal
        shapes = (B, H_Q, -(-s_q // 128)), (B, H_K, -(-s_k // 64)), (B, H_K, -(-s_k // 128))
        given = *inputs(s_q=s_q, s_k=s_k), *(torch.rand(shape) + 0.5 for shape in shapes)
        for a, b in zip(compiled(*given), _model(*given), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1


def test_fake_tensors():
    with FakeTensorMode() as mode:
        q, k, v, *scales = (mode.from_tensor(x) for x in arguments())
        given = dict(zip(SCALES, scales, strict=True))
        out, lse = fa3.flash_attn_func(q, k, v, **given, return_attn_probs=True)
        assert (out.shape, out.dtype) == ((B, S_Q, H_Q, DV), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((B, H_Q, S_Q), torch.float32)
        given["k_descale"] = given["k_descale"][..., :3]
        with pytest.raises(ValueError, match=r"k_descale has shape \(2, 2, 3\)"):
            fa3.flash_attn_func(q, k, v, **given)


def test_meta_tensors():
    q, k, v, *scales = (x.to("meta") for x in arguments())
    out = fa3.flash_attn_func(q, k, v, **dict(zip(SCALES, scales, strict=True)), check_scales=True)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (B, S_Q, H_Q, DV), torch.bfloat16)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operator():
    tensors = inputs()
    with Watch() as watch:
        fa3.flash_attn_func(*tensors)
    assert torch.ops.fa3.forward_fp8.default in watch.seen


def real(dtype=torch.bfloat16, d=64, s_q=S_Q, s_k=S_K, offset=0.0):
    """16-bit q, k, v; `offset` is common to all keys, as in real models."""
    q, k, v = (
        torch.randn(B, s, h, width)
        for s, h, width in ((s_q, H_Q, d), (s_k, H_K, d), (s_k, H_K, DV))
    )
    return q.to(dtype), (k + offset * torch.randn(d)).to(dtype), v.to(dtype)


def _exact(q, k, v, scale, causal):
    return textbook_attention(*(x.double().numpy() for x in (q, k, v)), scale, causal)


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
    ],
    ids=str,
)
def test_fp8_of_16_bit_inputs(options, bound, lse_bound, dtype):
    """Within FP8's rounding of the attention of the inputs, lse of the keys as they are."""
    q, k, v = real(dtype, offset=2.0)
    out, lse = fa3.flash_attn_fp8_func(q, k, v, return_attn_probs=True, **options)
    scale = options.get("softmax_scale", q.shape[-1] ** -0.5)
    wanted, wanted_lse = _exact(q, k, v, scale, options.get("causal", False))
    assert (out.dtype, out.shape) == (dtype, (B, S_Q, H_Q, DV))
    assert _rms(out - wanted) <= bound * _rms(wanted)
    assert (lse - wanted_lse).abs().max() <= lse_bound


def test_lse_is_that_of_the_keys_as_given():
    """What smooth_k takes from the scores is much more than lse may be off by."""
    q, k, v = real(offset=2.0)
    inputs = fa3.quantize_fp8(q, k, v, smooth_k=True, hadamard=True)
    _, smoothed = fa3.flash_attn_func(
        *inputs[:3], **dict(zip(SCALES, inputs[3:6], strict=True)), return_attn_probs=True
    )
    _, lse = fa3.flash_attn_fp8_func(q, k, v, return_attn_probs=True)
    assert (smoothed - lse).abs().max() > 1
    torch.testing.assert_close(lse, smoothed + inputs.lse_shift * 64**-0.5)


def test_what_the_options_are_for():
    """smooth_k: keys with a common offset in e4m3; hadamard: an outlying channel in int8."""
    q, k, v = real(offset=4.0)
    wanted, _ = _exact(q, k, v, 64**-0.5, False)
    with_it, without = (
        _rms(fa3.flash_attn_fp8_func(q, k, v, smooth_k=on) - wanted) for on in (True, False)
    )
    assert with_it < 0.6 * without
    q, k, v = real()
    q[..., 5], k[..., 5] = q[..., 5] / 20, k[..., 5] * 20
    wanted, _ = _exact(q, k, v, 64**-0.5, False)
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
    out = torch.empty(B, S_Q, H_Q, DV, dtype=dtype)
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
        (TypeError, ["window_size", "5", "pair"], {"window_size": 5}),
        (ValueError, ["window_size", "-2"], {"window_size": (-2, 0)}),
        (ValueError, ["softmax_scale", "-1"], {"softmax_scale": -1.0}),
        (TypeError, ["sm_margin", "0.5"], {"sm_margin": 0.5}),
        (TypeError, ["q", "list", "torch.Tensor"], {"q": [1.0]}),
        (ValueError, ["v", "length", "9", "200"], {"v": torch.zeros(B, 9, H_K, DV).bfloat16()}),
        (NotImplementedError, ["k", "requires_grad"], {"grad": "k"}),
        (TypeError, ["out", "list"], {"out": [1.0]}),
        (ValueError, ["out", "shape", "48"], {"out": torch.zeros(B, S_Q, H_Q, 64).bfloat16()}),
        (ValueError, ["out", "float32", "bfloat16"], {"out": torch.zeros(B, S_Q, H_Q, DV)}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_of_the_one_call(error, words, changes, monkeypatch):
    """Refused before anything is quantised."""
    launched = []
    monkeypatch.setattr(fa3.quantize, "_kernel", lambda *_: lambda *x: launched.append(x))
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


def _in_fp8(q, k, v):
    out, lse = fa3.flash_attn_fp8_func(q * 2, k, v, causal=True, return_attn_probs=True)
    return out + 1, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_the_one_call(dtype):
    given = real(dtype)
    compiled = torch.compile(_in_fp8, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given), _in_fp8(*given), strict=True):
        assert torch.equal(a, b)


def test_compile_the_one_call_with_dynamic_lengths():
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(_in_fp8, fullgraph=True, backend=_recorder(graphs), dynamic=True)
    for s_q, s_k in ((140, 200), (300, 500), (77, 90)):
        given = real(s_q=s_q, s_k=s_k)
        for a, b in zip(compiled(*given), _in_fp8(*given), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1
