"""fa3.integrations.torch: torch's own attention computed by fa3, on CPU tensors."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import _registry as registry
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn, varlen_attn_out

import fa3.integrations.torch as integration
from fa3.integrations import torch_operators

from .accuracy import assert_accurate, assert_lse

aten = torch.ops.aten
CPU = "_scaled_dot_product_flash_attention_for_cpu"
FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
RAGGED = "_flash_attention_forward"


@pytest.fixture
def active():
    integration.activate(cpu=True)
    yield
    integration.deactivate()


def _inputs(s_q, s_k, h_q=4, h_k=2, d=64, dv=None, dtype=torch.bfloat16, transposed=True):  # noqa: PLR0913
    """query, key, value and the gradient of the output, (b, h, s, d)."""
    shapes = (h_q, s_q, d), (h_k, s_k, d), (h_k, s_k, dv or d), (h_q, s_q, dv or d)
    tensors = []
    for h, s, width in shapes:
        x = torch.randn(2, s, h, width).to(dtype)
        tensors.append(x.transpose(1, 2) if transposed else x.transpose(1, 2).contiguous())
    return tensors


def _textbook(query, key, value, grad_out, visible, dtype=torch.float32):
    """out, lse and the gradients, computed in dtype; visible (s_q, s_k)."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v.repeat_interleave(group, 1)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out.to(dtype))
    return out.detach(), lse.detach(), *gradients


def _assert_right(found, inputs, visible, lse=None):
    """found: out and the gradients."""
    exact, exact_lse, *exact_gradients = _textbook(*inputs, visible)
    base, _, *base_gradients = _textbook(*inputs, visible, inputs[0].dtype)
    wanted = zip((exact, *exact_gradients), (base, *base_gradients), strict=True)
    for name, x, (truth, baseline) in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert_accurate(name, x, truth.to(x.dtype), baseline)
    if lse is not None:
        assert_lse("lse", lse, exact_lse)


def _with_gradients(attend, inputs):
    *qkv, grad_out = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attend(*qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, grad_out)


def _top_left(s_q, s_k):
    return torch.ones(s_q, s_k, dtype=torch.bool).tril()


LENGTHS = [(70, 70), (40, 90), (90, 40)]


@pytest.mark.parametrize(("s_q", "s_k"), LENGTHS)
@pytest.mark.parametrize("transposed", [True, False])
def test_causal_is_aligned_to_the_top_left(s_q, s_k, transposed, plain_torch, active):
    inputs = _inputs(s_q, s_k, transposed=transposed)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found = _with_gradients(attend, inputs)
    _assert_right(found, inputs, _top_left(s_q, s_k))
    assert integration.report() == {CPU: {"fa3": 1}, f"{CPU}_backward": {"fa3": 1}}


def test_on_the_kernels(device, active):
    """A window to the right on the emulator, or on a GPU."""
    inputs = [x.to(device) for x in _inputs(90, 40)]

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found = [x.cpu() for x in _with_gradients(attend, inputs)]
    _assert_right(found, [x.cpu() for x in inputs], _top_left(90, 40))
    assert all(set(calls) == {"fa3"} for calls in integration.report().values())


@pytest.mark.gpu
def test_on_a_gpu(device):
    """What torch chooses by itself, and what stays its own."""
    inputs = [x.to(device) for x in _inputs(90, 40, h_k=4)]

    def attend(q, k, v, **options):
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(q, k, v, **options)

    def with_dropout(q, k, v):
        return attend(q, k, v, dropout_p=0.25)

    def by_cudnn(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v)

    wanted = [_with_gradients(f, inputs) for f in (with_dropout, by_cudnn)]
    integration.activate()
    try:
        found = [_with_gradients(f, inputs) for f in (with_dropout, by_cudnn)]
        assert not any("fa3" in calls for calls in integration.report().values())
        causal = _with_gradients(lambda *qkv: attend(*qkv, is_causal=True), inputs)
        full = _with_gradients(attend, inputs)
    finally:
        integration.deactivate()
    assert sum(calls.get("fa3", 0) for calls in integration.report().values()) == 4
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    inputs = [x.cpu() for x in inputs]
    _assert_right([x.cpu() for x in causal], inputs, _top_left(90, 40))
    _assert_right([x.cpu() for x in full], inputs, torch.ones(90, 40, dtype=torch.bool))


def test_cross_attention_with_another_scale(plain_torch, active):
    inputs = _inputs(33, 57, h_k=4, dtype=torch.float16)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    scaled = [inputs[0] * 8, *inputs[1:]]  # by 1 / sqrt(d) again 1
    out, dq, dk, dv = _with_gradients(attend, inputs)
    _assert_right((out, dq / 8, dk, dv), scaled, torch.ones(33, 57, dtype=torch.bool))


def _operator_calls(name, qkv, causal):
    """Positional arguments of the dense operators beyond query, key and value."""
    return {
        FLASH: (0.0, causal, False),
        CPU: (0.0, causal),
        CUDNN: (None, True, 0.0, causal, False),
        EFFICIENT: (None, True, 0.0, causal),
    }[name]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", [FLASH, CPU, CUDNN, EFFICIENT])
def test_dense_operators(name, transposed, plain_torch, active):
    """Values, and the shapes, dtypes and strides that torch's meta functions promise."""
    dv = 64 if name in (FLASH, CPU) else 32
    inputs = _inputs(50, 50, dv=dv, transposed=transposed)
    operator = getattr(aten, name).default
    others = _operator_calls(name, inputs, causal=True)
    qkv = [x.requires_grad_() for x in inputs[:3]]
    results = operator(*qkv, *others)
    out, lse = results[:2]
    gradients = torch.autograd.grad(out, qkv, inputs[3], retain_graph=True)
    with FakeTensorMode() as mode:
        fakes = operator(*(mode.from_tensor(x) for x in qkv), *others)
    for x, fake in zip(results, fakes, strict=True):
        if isinstance(fake, torch.Tensor):
            same = (x.shape, x.dtype, x.stride()) == (fake.shape, fake.dtype, fake.stride())
            assert same, (name, x.shape, x.dtype, x.stride(), fake)
        else:
            assert x == fake
    if name in (FLASH, CUDNN):
        wanted = [torch.empty_like(x).stride() for x in qkv]
    else:
        wanted = [torch.empty_permuted(x.shape, (0, 2, 1, 3)).stride() for x in qkv]
    assert [x.stride() for x in gradients] == wanted
    lse = lse.squeeze(-1)[..., :50].detach()
    _assert_right((out.detach(), *gradients), inputs, _top_left(50, 50), lse)
    assert set(integration.report()) == {name, f"{name}_backward"}


@pytest.mark.parametrize("name", [CUDNN, EFFICIENT])
def test_other_backends_are_served_where_flash_is_allowed(name, plain_torch, active):
    """The forward pass decides for the backward pass."""
    inputs = _inputs(20, 20)
    operator = getattr(aten, name).default
    others = _operator_calls(name, inputs, causal=False)
    qkv = [x.requires_grad_() for x in inputs[:3]]
    out = operator(*qkv, *others)[0]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        with pytest.raises(NotImplementedError, match="flash attention is switched off"):
            operator(*qkv, *others)
        torch.autograd.grad(out, qkv, inputs[3])
    assert integration.report()[f"{name}_backward"] == {"fa3": 1}
    backward = getattr(aten, f"{name}_backward").default
    *_, seed, offset = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    rest = (inputs[3], *qkv, out, out)
    with pytest.raises(NotImplementedError, match="the forward pass was torch's"):
        if name == CUDNN:
            lengths = torch.zeros(0), torch.zeros(0), 20, 20
            backward(*rest, seed, offset, None, *lengths, 0.0, False)
        else:
            backward(*rest[:4], None, out, out, seed, offset, 0.0, [True] * 3 + [False])


def test_lower_right_bias(plain_torch, active, monkeypatch):
    """torch.nn.attention.bias calls the flash operator, whose is_causal is another one."""
    from torch.nn.attention import bias

    monkeypatch.setattr(bias, "can_use_flash_attention", lambda params: True)
    inputs = _inputs(30, 50, h_k=4)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(30, 50))

    found = _with_gradients(attend, inputs)
    visible = torch.ones(30, 50, dtype=torch.bool).tril(diagonal=20)
    _assert_right(found, inputs, visible)
    assert integration.report() == {FLASH: {"fa3": 1}, f"{FLASH}_backward": {"fa3": 1}}


def test_odd_addresses_and_strides(plain_torch, active):
    inputs = _inputs(40, 40, d=32)
    query, key, value, _ = inputs
    shifted = torch.empty(query.numel() + 3, dtype=query.dtype)[3:].view(query.shape)
    shifted.copy_(query)
    columns = key.transpose(2, 3).contiguous().transpose(2, 3)
    found = aten._scaled_dot_product_flash_attention(shifted, columns, value)[0]
    exact, *_ = _textbook(*inputs, torch.ones(40, 40, dtype=torch.bool))
    base, *_ = _textbook(*inputs, torch.ones(40, 40, dtype=torch.bool), query.dtype)
    assert_accurate("out", found, exact.to(found.dtype), base)
    empty = query[:, :, :0]
    assert aten._scaled_dot_product_flash_attention(empty, key, value)[0].shape == empty.shape


FALLBACKS = [
    ("q has dtype torch.float32", lambda q, k, v: (q.float(), k.float(), v.float()), {}),
    ("attn_mask is a tensor", None, {"attn_mask": torch.zeros(20, 20, dtype=torch.bfloat16)}),
    ("q has head dim 512", lambda q, k, v: [F.pad(x, (0, 448)) for x in (q, k, v)], {}),
    ("softmax_scale is -1.0", None, {"scale": -1.0}),
]


@pytest.mark.parametrize(("reason", "change", "options"), FALLBACKS)
def test_falls_back_to_torch(reason, change, options, plain_torch):
    qkv = _inputs(20, 20, h_k=4)[:3]
    qkv = [x.requires_grad_() for x in (qkv if change is None else change(*qkv))]

    def attend():
        out = F.scaled_dot_product_attention(*qkv, **options)
        return out, *torch.autograd.grad(out.sum(), qkv)

    wanted = attend()
    integration.activate(cpu=True)
    try:
        found = attend()
    finally:
        integration.deactivate()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    report = integration.report()
    assert set(report) == {CPU, f"{CPU}_backward"}
    for ((outcome, count),) in (calls.items() for calls in report.values()):
        assert outcome.startswith(reason)
        assert count == 1


def test_dropout_and_debug_masks_are_torchs(plain_torch, active):
    """Which has no such kernels for CPU tensors."""
    q, k, v, _ = _inputs(20, 20)
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.1, which fa3 does not compute"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.1)
    with pytest.raises(NotImplementedError, match="return_debug_mask is True"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, True)
    assert integration.report() == {}


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)])
def test_gpus_without_kernels(capability, run_on, active):
    from fa3.launch import dispatch

    run_on(dispatch.Target("gpu", "another GPU", capability, 100))
    q, k, v, _ = _inputs(20, 20, h_k=4)
    F.scaled_dot_product_attention(q, k, v)
    major, minor = capability
    assert integration.report() == {CPU: {f"compute capability {major}.{minor}": 1}}


CU_Q, CU_K = (0, 30, 30, 75), (0, 45, 60, 110)


def _packed(s_q=75, s_k=110, h_k=2):
    q, k, v, dout = _inputs(s_q, s_k, h_k=h_k)
    return [x[0].transpose(0, 1).contiguous() for x in (q, k, v, dout)]


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (7, 3)])
def test_varlen(window, plain_torch, active):
    q, k, v, dout = _packed()
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (CU_Q, CU_K))

    def attend(q, k, v):
        options = {"window_size": window, "enable_gqa": True}
        return varlen_attn(q, k, v, cu_q, cu_k, 45, 50, **options)

    found = _with_gradients(attend, (q, k, v, dout))
    for i in range(3):
        rows, keys = (slice(*x[i : i + 2]) for x in (CU_Q, CU_K))
        inputs = [
            x[s].transpose(0, 1)[None]
            for x, s in zip((q, k, v, dout), (rows, keys, keys, rows), strict=True)
        ]
        s_q, s_k = inputs[0].shape[2], inputs[1].shape[2]
        if s_q == 0:
            assert not found[2][keys].any()
            assert not found[3][keys].any()
            continue
        distance = torch.arange(s_k) - torch.arange(s_q)[:, None] - (s_k - s_q)
        left, right = window
        visible = (distance >= -left if left >= 0 else True) & (
            distance <= right if right >= 0 else torch.tensor(True)
        )
        cut = zip(found, (rows, rows, keys, keys), strict=True)
        cut = [x[s].transpose(0, 1)[None] for x, s in cut]
        _assert_right(cut, inputs, visible.expand(s_q, s_k))
    assert integration.report() == {RAGGED: {"fa3": 1}, "_flash_attention_backward": {"fa3": 1}}


def test_varlen_into_a_tensor_and_from_pages(plain_torch, active):
    q, k, v, _ = _packed()
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (CU_Q, CU_K))
    wanted = varlen_attn(q, k, v, cu_q, cu_k, 45, 50, enable_gqa=True)
    out = torch.zeros(75, 4, 65, dtype=q.dtype)[..., 1:]  # no strides for TMA
    varlen_attn_out(out, q, k, v, cu_q, cu_k, 45, 50, enable_gqa=True)
    assert torch.equal(out, wanted)
    used = torch.tensor([45, 15, 50], dtype=torch.int32)
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    pages = []
    for x in (k, v):
        rows = [
            F.pad(x[a:b], (0, 0, 0, 0, 0, 64 - (b - a)))
            for a, b in zip(CU_K, CU_K[1:], strict=False)
        ]
        pages.append(torch.stack(rows).view(12, 16, 2, 64))
    paged = varlen_attn(
        *(q, *pages, cu_q, None, 45, 64),
        enable_gqa=True,
        seqused_k=used,
        block_table=table,
    )
    assert_accurate("out", paged, wanted, wanted)
    counts = integration.report()
    assert counts == {RAGGED: {"fa3": 2}, f"{RAGGED}_no_dropout_inplace": {"fa3": 1}}


def test_quantised(plain_torch, active):
    import fa3

    q, k, v, _ = (x.transpose(1, 2).to(torch.float8_e4m3fn) for x in _inputs(40, 60))
    scales = [torch.rand(2, 2) + 0.5 for _ in range(3)]
    wanted = fa3.flash_attn_func(
        *(q, k, v), q_descale=scales[0], k_descale=scales[1], v_descale=scales[2]
    )
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    dense = aten._scaled_dot_product_flash_attention.quantized(*swapped, *scales)[0]
    raw = aten._flash_attention_forward.quantized(
        *(q, k, v, None, None, 40, 60, 0.0, False, False, *scales)
    )[0]
    assert dense.dtype == torch.bfloat16
    assert torch.equal(dense.transpose(1, 2), wanted)
    assert torch.equal(raw, wanted)


def test_jagged(plain_torch, active, monkeypatch):
    """Nested tensors come as packed ones; which backend they get is decided for their device."""
    from torch.nested._internal import sdpa

    chosen = SDPBackend.FLASH_ATTENTION
    monkeypatch.setattr(sdpa, "_select_sdp_backend", lambda *arguments: chosen)
    parts = [torch.randn(n, 4, 64).bfloat16() for n in (20, 7, 33)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    x = nested.transpose(1, 2)
    out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    for part, found in zip(parts, out.transpose(1, 2).unbind(), strict=True):
        x = part.transpose(0, 1)[None]
        exact, *_ = _textbook(x, x, x, x, _top_left(*part.shape[:1] * 2))
        base, *_ = _textbook(x, x, x, x, _top_left(*part.shape[:1] * 2), x.dtype)
        assert_accurate("out", found.transpose(0, 1)[None], exact.to(x.dtype), base)
    out.values().sum().backward()
    assert integration.report() == {RAGGED: {"fa3": 1}, "_flash_attention_backward": {"fa3": 1}}


def test_multihead_attention(plain_torch, active):
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.bfloat16)
    x = torch.randn(2, 30, 64, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(30, dtype=torch.bfloat16)
    out, _ = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    out.sum().backward()
    assert integration.report() == {CPU: {"fa3": 1}, f"{CPU}_backward": {"fa3": 1}}


def test_compiled_and_under_autocast(plain_torch, active):
    """torch.compile checks that strides are those that the graph was made for."""
    inputs = [x.float() for x in _inputs(40, 40, transposed=False)]

    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    wanted = _with_gradients(lambda *qkv: attend(*qkv).float(), inputs)
    compiled = torch.compile(lambda *qkv: attend(*qkv).float(), backend="aot_eager", fullgraph=True)
    found = _with_gradients(compiled, inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert integration.report() == {CPU: {"fa3": 2}, f"{CPU}_backward": {"fa3": 2}}


def test_leaves_no_trace():
    names = [*torch_operators.OPERATORS, *torch_operators.CPU_OPERATORS]

    def state():
        tables = [torch._C._dispatch_dump(f"aten::{name}") for name in names]
        flag = torch._C._get_fa3_sdp_enabled()
        return tables, dict(registry._FLASH_ATTENTION_IMPLS), registry._FLASH_ATTENTION_ACTIVE, flag

    before = state()
    integration.deactivate()
    integration.activate(cpu=True)
    assert torch.nn.attention.current_flash_attention_impl() == "FA3"
    integration.activate()
    assert state() != before
    integration.deactivate()
    integration.deactivate()
    assert state() == before


def test_programs_that_activate_it_themselves(plain_torch):
    """As torchtitan does, by the name of flash-attn's."""
    q, k, v, _ = _inputs(20, 20, h_k=4)
    integration.register(cpu=True)
    try:
        before = integration.report()
        F.scaled_dot_product_attention(q, k, v)
        assert integration.report() == before
        torch.nn.attention.activate_flash_attention_impl("FA3")
        F.scaled_dot_product_attention(q, k, v)
        torch.nn.attention.restore_flash_attention_impl()
        F.scaled_dot_product_attention(q, k, v)
    finally:
        integration.deactivate()
    assert sum(integration.report()[CPU].values()) == 1 + before.get(CPU, {}).get("fa3", 0)


def test_torch_without_a_registry(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(RuntimeError, match="no registry of attention implementations .* its own"):
        integration.activate()


def test_an_operator_that_differs_stays_torchs(monkeypatch):
    def older(query, key, value, dropout_p=0.0, is_causal=False, *, scale=None):
        raise AssertionError

    monkeypatch.setitem(integration.CPU_OPERATORS, CPU, older)
    with pytest.warns(UserWarning, match=f"{CPU} stays torch's own: .* differs in attn_mask"):
        integration.activate(cpu=True)
    try:
        q, k, v, _ = _inputs(20, 20, h_k=4)
        F.scaled_dot_product_attention(q, k, v)
    finally:
        integration.deactivate()
    assert integration.report() == {}


@pytest.mark.parametrize("name", [*torch_operators.OPERATORS, *torch_operators.CPU_OPERATORS])
def test_defaults_are_torchs(name):
    """torch leaves out arguments that have the schema's default."""
    function = (torch_operators.OPERATORS | torch_operators.CPU_OPERATORS)[name]
    base, _, overload = name.partition(".")
    known = inspect.signature(function).parameters
    for argument in torch._C._get_schema(f"aten::{base}", overload).arguments:
        if argument.has_default_value():
            assert known[argument.name].default == argument.default_value
