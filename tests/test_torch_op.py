"""torch.ops.fa3: what the compiler, fake tensors and dispatch modes see of the kernel."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fa3

from .cases import Case, make_inputs

CASE = Case(head_dim=128, head_dim_v=128, h_q=4, s_q=70, s_k=100, causal=True)


@pytest.fixture
def qkv(device):
    return tuple(x.values for x in make_inputs(CASE, device))


def test_operator_agrees_with_eager(qkv):
    wanted, wanted_lse = fa3.flash_attn_func(*qkv, causal=True, return_attn_probs=True)
    out, lse = torch.ops.fa3.forward(*qkv, causal=True)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


def test_opcheck(qkv):
    torch.library.opcheck(torch.ops.fa3.forward.default, (*qkv, None, True, -1, -1, 0))
    torch.library.opcheck(torch.ops.fa3.forward.default, (*qkv, 0.3, False, 20, 5, 1))


def test_opcheck_with_out(qkv):
    out = torch.empty_like(qkv[0])
    arguments = (*qkv, out, None, True, -1, -1, 0)
    torch.library.opcheck(torch.ops.fa3.forward_out.default, arguments)


def test_opcheck_with_softcap_and_sinks(plain_torch):
    qkv = [x.values for x in make_inputs(CASE, torch.device("cpu"))]
    out = torch.empty_like(qkv[0])
    for sink in (torch.randn(4), torch.randn(1, 4).bfloat16()):
        options = {"causal": True, "softcap": 20.0, "learnable_sink": sink}
        torch.library.opcheck(torch.ops.fa3.forward.default, qkv, options)
        torch.library.opcheck(torch.ops.fa3.forward_out.default, (*qkv, out), options)
    few = torch.randn(3)
    with FakeTensorMode() as mode:
        q, k, v, sink = (mode.from_tensor(x) for x in (*qkv, few))
        with pytest.raises(ValueError, match=r"learnable_sink has shape \(3,\), expected \(4,\)"):
            fa3.flash_attn_func(q, k, v, learnable_sink=sink)


def test_compile_with_softcap_and_sinks(plain_torch):
    """One graph for all caps, which are symbols; where somebody watches the operator gets both."""
    q, k, v = (x.values for x in make_inputs(CASE, torch.device("cpu")))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def model(sink, softcap):
        options = {"causal": True, "softcap": softcap, "return_attn_probs": True}
        return fa3.flash_attn_func(q, k, v, **options, learnable_sink=sink * 2)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for softcap in (20.0, 1.5, 0.3):
        sink = torch.randn(4)
        for given, wanted in zip(compiled(sink, softcap), model(sink, softcap), strict=True):
            assert torch.equal(given, wanted)
    assert len(graphs) == 1

    def into(out, sink):
        options = {"softcap": 1.5, "learnable_sink": sink, "return_attn_probs": True}
        return fa3.flash_attn_func(q, k, v, causal=True, out=out, **options)

    for given, wanted in zip(
        torch.compile(into, fullgraph=True, backend="aot_eager")(torch.empty_like(q), sink),
        into(torch.empty_like(q), sink),
        strict=True,
    ):
        assert torch.equal(given, wanted)
    with torch.no_grad():
        sink = torch.nn.Parameter(sink)
        traced = torch.jit.trace(lambda sink: model(sink, 20.0), (sink,))
        for given, wanted in zip(traced(-sink), model(-sink, 20.0), strict=True):
            assert torch.equal(given, wanted)


def _model(q, k, v):
    out, lse = fa3.flash_attn_func(q * 2, k, v, causal=True, return_attn_probs=True)
    return out + 1, lse


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(backend, qkv):
    compiled = torch.compile(_model, fullgraph=True, backend=backend)
    for given, wanted in zip(compiled(*qkv), _model(*qkv), strict=True):
        torch.testing.assert_close(given, wanted)


@pytest.mark.slow
def test_inductor(qkv):
    """The default backend, on views that it must hand over with their strides."""

    def model(*heads_first):
        return fa3.flash_attn_func(*(x.transpose(1, 2) for x in heads_first), causal=True)

    heads_first = [x.transpose(1, 2).contiguous() for x in qkv]
    compiled = torch.compile(model, fullgraph=True)
    assert torch.equal(compiled(*heads_first), model(*heads_first))


def test_compile_with_dynamic_lengths(device):
    """One graph serves other lengths."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(_model, fullgraph=True, backend=backend, dynamic=True)
    for s_q, s_k in ((70, 100), (50, 90), (33, 40)):
        case = Case(head_dim=128, head_dim_v=128, s_q=s_q, s_k=s_k)
        given = [x.values for x in make_inputs(case, device)]
        for a, b in zip(compiled(*given), _model(*given), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.fa3.forward in targets or torch.ops.fa3.forward.default in targets


def test_compile_with_options_that_vary(qkv):
    """Windows and scales that torch.compile turns into symbols."""

    def model(q, k, v, left, scale):
        return fa3.flash_attn_func(q, k, v, scale, window_size=(left, 4))

    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for left, scale in ((3, 0.1), (17, 0.2), (40, 0.3)):
        assert torch.equal(compiled(*qkv, left, scale), model(*qkv, left, scale))


NO_BACKWARD = "requires_grad=True, but q has dtype torch.float8_e4m3fn.* torch.no_grad"


@pytest.mark.parametrize("compiled", [False, True])
def test_no_backward_pass_of_fp8(compiled, qkv):
    q, k, v = (x.to(torch.float8_e4m3fn) for x in qkv)
    q.requires_grad_()
    attend = (
        torch.compile(fa3.flash_attn_func, backend="eager") if compiled else fa3.flash_attn_func
    )
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        attend(q, k, v)


def test_no_backward_pass_of_the_operator(qkv):
    q, k, v = (x.to(torch.float8_e4m3fn) for x in qkv)
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        torch.ops.fa3.forward(q.requires_grad_(), k, v)


def test_compile_with_out(qkv):
    def model(q, k, v, out):
        return fa3.flash_attn_func(q, k, v, causal=True, out=out) * 2

    out = torch.zeros_like(qkv[0])
    doubled = torch.compile(model, fullgraph=True, backend="aot_eager")(*qkv, out)
    wanted = fa3.flash_attn_func(*qkv, causal=True)
    assert torch.equal(out, wanted)
    assert torch.equal(doubled, wanted * 2)


def test_fake_tensors(qkv):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in qkv]
        out, lse = fa3.flash_attn_func(*fakes, return_attn_probs=True)
    b, s_q, h_q, d = qkv[0].shape
    assert (out.shape, out.dtype, out.is_contiguous()) == (qkv[0].shape, qkv[0].dtype, True)
    assert (lse.shape, lse.dtype) == ((b, h_q, s_q), torch.float32)


def test_fake_tensors_are_checked(qkv):
    q, k, v = qkv
    k = k[:, :50]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        with pytest.raises(ValueError, match="v has length 100 but k has 50"):
            fa3.flash_attn_func(*fakes)


def test_meta_tensors():
    q, k, v = (x.tensor.to("meta") for x in make_inputs(CASE, torch.device("cpu")))
    out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.device.type, out.shape) == ("meta", q.shape)
    assert (lse.device.type, lse.shape) == ("meta", (1, 4, 70))


def test_dispatch_modes_see_the_operator(qkv):
    """The eager path skips the operator, but not where someone watches."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        fa3.flash_attn_func(*qkv, causal=True)
    assert torch.ops.fa3.forward.default in seen


def test_function_modes_see_the_operator(qkv):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        fa3.flash_attn_func(*qkv, causal=True)
    assert torch.ops.fa3.forward in seen


class _Tagged(torch.Tensor):
    """A subclass that changes nothing."""


def test_subclasses_see_the_operator(qkv):
    """In any place; a result has their type, as torch's own have."""
    wanted = fa3.flash_attn_func(*qkv, causal=True)
    for i in range(3):
        given = list(qkv)
        given[i] = given[i].as_subclass(_Tagged)
        out = fa3.flash_attn_func(*given, causal=True)
        assert type(out) is _Tagged
        assert torch.equal(out, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trace_records_the_operator(qkv):
    traced = torch.jit.trace(lambda *qkv: fa3.flash_attn_func(*qkv, causal=True), qkv)
    assert [node.kind() for node in traced.graph.nodes()].count("fa3::forward") == 1
    with pytest.raises(
        NotImplementedError, match="softmax_scale is a tensor, as sizes .* torch.jit"
    ):
        torch.jit.trace(fa3.flash_attn_func, (*qkv, torch.tensor(0.3)))


def test_scale_in_a_tensor(plain_torch):
    """It stays a symbol while a graph is made."""
    qkv = [x.values for x in make_inputs(CASE, torch.device("cpu"))]

    class Model(torch.nn.Module):
        def forward(self, q, k, v, scale):
            return fa3.flash_attn_func(q, k, v, scale, causal=True)

    first, second = torch.tensor(0.3), torch.tensor(0.7)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
        exported = torch.export.export(Model(), (*qkv, first)).module()
        for scale in (first, second):
            wanted = fa3.flash_attn_func(*qkv, scale.item(), causal=True)
            for given in (Model(), compiled, exported):
                assert torch.equal(given(*qkv, scale), wanted)


def test_parameters_without_grad_mode(qkv):
    wanted = fa3.flash_attn_func(*qkv, causal=True)
    with torch.no_grad():
        parameters = [torch.nn.Parameter(x.clone()) for x in qkv]
        assert torch.equal(fa3.flash_attn_func(*parameters, causal=True), wanted)


def test_writing_to_out_counts_as_a_change(qkv):
    """Autograd must notice when something saved for a backward pass is overwritten."""
    out = torch.zeros_like(qkv[0])
    before = out._version
    fa3.flash_attn_func(*qkv, causal=True, out=out)
    assert out._version > before
