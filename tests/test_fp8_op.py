"""torch.ops.fa3.forward of FP8: what the compiler, fake tensors and dispatch modes see of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fa3

from .fp8_calls import (
    DV,
    FORMS,
    H_K,
    H_Q,
    OUT_SHAPE,
    S_Q,
    SHIFT_SHAPE,
    B,
    descales,
    inputs,
    real,
)

pytestmark = pytest.mark.usefixtures("plain_torch")
GIVEN = ("128", "64", "128")
NAMES = (*FORMS, "v_shift")


def arguments():
    given = descales(*GIVEN)
    return *inputs(), *given.values(), torch.randn(SHIFT_SHAPE)


def _model(q, k, v, q_descale, k_descale, v_descale, v_shift):
    out, lse = fa3.flash_attn_func(
        q,
        k,
        v,
        causal=True,
        q_descale=q_descale * 2,
        k_descale=k_descale,
        v_descale=v_descale,
        v_shift=v_shift,
        return_attn_probs=True,
        check_scales=True,
    )
    return out + 1, lse


def test_operator_agrees_with_eager():
    q, k, v, *scales = arguments()
    wanted = fa3.flash_attn_func(
        *(q, k, v, None, True),
        **dict(zip(NAMES, scales, strict=True)),
        window_size=(50, 0),
        return_attn_probs=True,
    )
    given = torch.ops.fa3.forward(q, k, v, None, True, 50, 0, 0, *scales)
    for a, b in zip(given, wanted, strict=True):
        assert torch.equal(a, b)


# without test_schema, which compares inputs by torch.allclose and fails for every FP8 tensor
OPCHECKS = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"


def test_opcheck():
    q, k, v, *scales = arguments()
    given = dict(zip(NAMES, scales, strict=True))
    for options in (
        {**given, "causal": True, "check_scales": True},
        {"softmax_scale": 0.3, "window_left": 20, "window_right": 5},
    ):
        out = torch.empty(OUT_SHAPE, dtype=torch.float16)
        of_dtype = {**options, "out_dtype": torch.float32}
        for operator, tensors, keywords in (
            (torch.ops.fa3.forward.default, (q, k, v), of_dtype),
            (torch.ops.fa3.forward_out.default, (q, k, v, out), options),
        ):
            torch.library.opcheck(operator, tensors, keywords, test_utils=OPCHECKS)


def test_names_from_before():
    q, k, v, *scales = arguments()
    given = dict(zip(NAMES, scales, strict=True))
    wanted, wanted_lse = torch.ops.fa3.forward(q, k, v, 0.2, True, 50, 0, **given)
    out, lse = torch.ops.fa3.forward_fp8(q, k, v, *scales, 0.2, True, 50, 0)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    out = torch.empty_like(wanted)
    lse = torch.ops.fa3.forward_fp8_out(q, k, v, out, *scales, 0.2, True, 50, 0)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_operators_change_only_out():
    """What test_schema would look at."""
    q, k, v, *scales = arguments()
    out = torch.empty(OUT_SHAPE)
    given = q, k, v, *scales
    before = [x.clone() for x in given]
    named = dict(zip(NAMES, scales, strict=True), causal=True)
    lse = torch.ops.fa3.forward_out(q, k, v, out, **named)
    result, _ = torch.ops.fa3.forward(q, k, v, **named)
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
    out = torch.zeros(OUT_SHAPE)
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
        scales = (torch.rand(shape) + 0.5 for shape in (*shapes, SHIFT_SHAPE))
        given = *inputs(s_q=s_q, s_k=s_k), *scales
        for a, b in zip(compiled(*given), _model(*given), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1


def test_fake_tensors():
    with FakeTensorMode() as mode:
        q, k, v, *scales = (mode.from_tensor(x) for x in arguments())
        given = dict(zip(NAMES, scales, strict=True))
        out, lse = fa3.flash_attn_func(q, k, v, **given, return_attn_probs=True)
        assert (out.shape, out.dtype) == ((B, S_Q, H_Q, DV), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((B, H_Q, S_Q), torch.float32)
        given["k_descale"] = given["k_descale"][..., :3]
        with pytest.raises(ValueError, match=r"k_descale has shape \(2, 2, 3\)"):
            fa3.flash_attn_func(q, k, v, **given)
        given |= {"k_descale": None, "v_shift": given["v_shift"][..., :16]}
        with pytest.raises(ValueError, match=r"v_shift has shape \(2, 2, 16\)"):
            fa3.flash_attn_func(q, k, v, **given)


def test_operator_without_scales():
    q, k, v = inputs()
    out, _ = torch.ops.fa3.forward(q, k, v)
    assert torch.equal(out, fa3.flash_attn_func(q, k, v))
    compiled = torch.compile(torch.ops.fa3.forward, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v)[0], out)


def test_meta_tensors():
    q, k, v, *scales = (x.to("meta") for x in arguments())
    out = fa3.flash_attn_func(q, k, v, **dict(zip(NAMES, scales, strict=True)), check_scales=True)
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
    assert torch.ops.fa3.forward.default in watch.seen


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
