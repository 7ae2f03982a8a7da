"""vmap, forward-mode AD, counts of operations and names for the profiler."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fa3

from .cases import pairwise

pytestmark = pytest.mark.usefixtures("plain_torch")
E4M3 = torch.float8_e4m3fn
B, S_Q, S_K, H_Q, H_K, D, DV = 2, 10, 13, 4, 2, 32, 16
N = 3  # entries of vmap
SHAPES = {
    "q": (B, S_Q, H_Q, D),
    "k": (B, S_K, H_K, D),
    "v": (B, S_K, H_K, DV),
    "q_descale": (B, H_K),
    "k_descale": (B, H_K, 1),
    "v_descale": (B, H_K, 1, DV),
    "v_shift": (B, H_K, DV),
}
SIXTEEN_BITS = ("q", "k", "v")


def _attend(*tensors):
    """Those of SHAPES, in its order; 16 bits if there are three, which operator is seen to."""
    options = dict(zip(list(SHAPES)[3:], tensors[3:], strict=False))
    return fa3.flash_attn_func(*tensors[:3], causal=True, return_attn_probs=True, **options)


def _tensor(name, *leading):
    x = torch.randn(*leading, *SHAPES[name])
    if "_" in name:
        return x.abs() + 0.5 if "descale" in name else x
    return x


def _cast(name, x, one_byte):
    if "_" in name:
        return x
    return x.to(E4M3 if one_byte else torch.bfloat16)


def _one_by_one(call, tensors, dims):
    entries = [
        call(*(x if d is None else x.select(d, i) for x, d in zip(tensors, dims, strict=True)))
        for i in range(N)
    ]
    return tuple(torch.stack(x) for x in zip(*entries, strict=True))


def _assert_equal(given, wanted):
    for a, b in zip(given, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a, b)


DIMS = pairwise(
    {"q": (0, 1, None), "k": (0, 2, None), "v": (0, 4, None), "scales": (0, -1, None)}, seed=1
)


@pytest.mark.parametrize("one_byte", [False, True], ids=["16 bits", "one byte"])
@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: "-".join(map(str, dims.values())))
def test_vmap(dims, one_byte):
    """Any dimension of any of the tensors."""
    names = list(SHAPES) if one_byte else SIXTEEN_BITS
    dims = [dims[name if name in dims else "scales"] for name in names]
    tensors = [
        _cast(name, _tensor(name) if d is None else _tensor(name, N).movedim(0, d), one_byte)
        for name, d in zip(names, dims, strict=True)
    ]
    assert dims != len(dims) * [None]
    _assert_equal(torch.vmap(_attend, tuple(dims))(*tensors), _one_by_one(_attend, tensors, dims))


@pytest.mark.parametrize("one_byte", [False, True], ids=["16 bits", "one byte"])
@pytest.mark.parametrize(
    ("of_q", "shape", "dim"),
    [
        (0, (H_Q,), 0),
        (None, (H_Q,), 1),
        (0, (H_Q,), None),
        (0, (B, H_Q), None),
        (None, (B, H_Q), 1),
        (0, (B, H_Q), 2),
    ],
)
def test_vmap_of_sinks(of_q, shape, dim, one_byte):
    """They may have no batch: then one serves all entries, also where vmap has several."""
    q, k, v = (_cast(name, _tensor(name), one_byte) for name in "qkv")
    if of_q == 0:
        q = _cast("q", _tensor("q", N), one_byte)
    sink = torch.randn(shape) if dim is None else torch.randn(N, *shape).movedim(0, dim)

    def call(q, sink):
        options = {"softcap": 1.5, "learnable_sink": sink, "return_attn_probs": True}
        return fa3.flash_attn_func(q, k, v, causal=True, **options)

    given = torch.vmap(call, (of_q, dim))(q, sink)
    _assert_equal(given, _one_by_one(call, (q, sink), (of_q, dim)))


def test_vmap_over_a_dimension_that_lies_within_rows():
    """With one batch entry no copy is needed to join them, but rows are not contiguous."""
    q, k, v = (_tensor(name, N).bfloat16()[:, :1] for name in "qkv")
    tensors = [x.movedim(0, -1).contiguous() for x in (q, k, v)]
    given = torch.vmap(_attend, -1)(*tensors)
    _assert_equal(given, _one_by_one(_attend, (q, k, v), (0, 0, 0)))


@pytest.mark.parametrize("one_byte", [False, True], ids=["16 bits", "one byte"])
def test_nested_vmap(one_byte):
    """q is mapped twice, k by the outer one, v by the inner one."""
    q, k, v = _tensor("q", N, 2), _tensor("k", N), _tensor("v", 2)
    q, k, v = (_cast(name, x, one_byte) for name, x in zip("qkv", (q, k, v), strict=True))
    given = torch.vmap(torch.vmap(_attend, (0, None, 0)), (0, 0, None))(q, k, v)
    rows = [[_attend(q[i, j], k[i], v[j]) for j in range(2)] for i in range(N)]
    wanted = [torch.stack([torch.stack([x[part] for x in row]) for row in rows]) for part in (0, 1)]
    _assert_equal(given, wanted)


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("one_byte", [False, True], ids=["16 bits", "one byte"])
def test_vmap_with_out(one_byte, dim):
    """It is written in place, wherever the mapped dimension is."""
    q, k, v = (_cast(name, _tensor(name, N), one_byte) for name in "qkv")
    out = torch.zeros(N, B, S_Q, H_Q, DV, dtype=torch.bfloat16).movedim(0, dim)
    torch.vmap(lambda q, k, v, out: fa3.flash_attn_func(q, k, v, out=out), (0, 0, 0, dim))(
        *(q, k, v, out)
    )
    wanted = torch.stack([fa3.flash_attn_func(*x) for x in zip(q, k, v, strict=True)])
    assert torch.equal(out.movedim(dim, 0), wanted)
    with pytest.raises(ValueError, match="out is not mapped over by vmap, but an input is, 3"):
        torch.vmap(lambda q: fa3.flash_attn_func(q, k[0], v[0], out=wanted[0]))(q)


@pytest.mark.parametrize("smooth", [False, True])
def test_vmap_of_quantisation(smooth):
    """q is shared; what is not asked for stays None."""
    q, k, v = _tensor("q").half(), _tensor("k", N).half(), _tensor("v", N).half()

    def call(*qkv):
        given = fa3.quantize_fp8(*qkv, smooth_k=smooth, smooth_v=smooth)
        return tuple(x.float() for x in given if x is not None)

    dims = None, 0, 0
    _assert_equal(torch.vmap(call, dims)(q, k, v), _one_by_one(call, (q, k, v), dims))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vmap_of_the_one_call(dtype):
    q, k, v = _tensor("q").to(dtype), _tensor("k", N).to(dtype), _tensor("v").to(dtype)

    def call(*qkv):
        return fa3.flash_attn_fp8_func(*qkv, causal=True, return_attn_probs=True)

    dims = None, 0, None
    _assert_equal(torch.vmap(call, dims)(q, k, v), _one_by_one(call, (q, k, v), dims))


def _out():
    return torch.empty(B, S_Q, H_Q, DV, dtype=torch.bfloat16)


REFUSED = [  # call, what has a tangent, the operator that says so
    (fa3.flash_attn_func, "q", "forward"),
    (fa3.flash_attn_func, "v", "forward"),
    (torch.ops.fa3.forward, "k", "forward"),
    (lambda **given: torch.ops.fa3.forward_out(out=_out(), **given), "q", "forward_out"),
    (fa3.flash_attn_func, "q_descale", "forward"),
    (torch.ops.fa3.forward, "v_shift", "forward"),
    (lambda **x: torch.ops.fa3.forward_out(out=_out(), **x), "k_descale", "forward_out"),
    (fa3.quantize_fp8, "v", "quantize_fp8"),
    (fa3.flash_attn_fp8_func, "q", "quantize_fp8"),
]
IDS = [f"{name}-{operator}" for _, name, operator in REFUSED]


@pytest.mark.parametrize(("call", "name", "operator"), REFUSED, ids=IDS)
def test_forward_ad_is_refused(call, name, operator):
    """Not answered by a tangent of zero; without a tangent the level changes nothing."""
    one_byte = "_" in name
    names = SHAPES if one_byte else SIXTEEN_BITS
    given = {x: _cast(x, _tensor(x), one_byte) for x in names}
    message = f"{name} has a tangent, but fa3::{operator} has no forward-mode derivative"
    x = given.pop(name)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: call(**given, **{name: x}), (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=message):
            call(**given, **{name: dual})
        call(**given, **{name: x})
        with forward_ad._set_fwd_grad_enabled(False):
            call(**given, **{name: dual})


def test_tangents_within_vmap():
    """torch.func.jacfwd, and a vmap under a jvp."""
    q, k, v = (_cast(name, _tensor(name), False) for name in "qkv")
    message = "q has a tangent, but fa3::forward"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(lambda q: fa3.flash_attn_func(q, k, v))(q)
    mapped = torch.vmap(lambda q: fa3.flash_attn_func(q, k, v))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(mapped, (q[None],), (q[None],))


@pytest.mark.parametrize("causal", [False, True])
def test_operations_are_counted_as_those_of_torch(causal):
    """All pairs, whatever the mask; so a model has one count, whatever attention it uses."""
    q, k, v = (_cast(name, _tensor(name), False) for name in "qkv")
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    with FlopCounterMode(display=False) as wanted:
        backend = torch.nn.attention.SDPBackend.MATH  # its products are counted one by one
        with torch.nn.attention.sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True)
    assert wanted.get_total_flops() == 2 * B * H_Q * S_Q * S_K * (D + DV)
    bytes_ = [x.to(E4M3) for x in (q, k, v)]
    for call in (
        lambda: fa3.flash_attn_func(q, k, v, causal=causal),
        lambda: fa3.flash_attn_func(q, k, v, causal=causal, window_size=(3, 0), out=_out()),
        lambda: fa3.flash_attn_func(*bytes_, causal=causal),
        lambda: fa3.flash_attn_func(*bytes_, causal=causal, out=_out()),
        lambda: fa3.flash_attn_fp8_func(q, k, v, causal=causal),
    ):
        with FlopCounterMode(display=False) as given:
            call()
        assert given.get_total_flops() == wanted.get_total_flops()


def test_names_in_the_profiler():
    q, k, v = (_cast(name, _tensor(name), False) for name in "qkv")
    with torch.autograd.profiler.profile() as profile:
        fa3.flash_attn_func(q, k, v)
        fa3.flash_attn_fp8_func(q, k, v)
    counts = {x.key: x.count for x in profile.key_averages() if x.key.startswith("fa3::")}
    assert counts == {"fa3::forward": 2, "fa3::quantize_fp8": 1}
