"""What surrounds a call changes nothing: defaults, modes, tracing, transforms, profilers."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fa3
from fa3.call import scales

from . import reference

E4M3 = torch.float8_e4m3fn


def _inputs(s_q=45, s_k=60):
    shapes = (2, s_q, 4, 32), (2, s_k, 2, 32), (2, s_k, 2, 16)
    return tuple(torch.randn(shape).bfloat16() for shape in shapes)


def _sixteen_bits(q, k, v):
    return fa3.flash_attn_func(q, k, v, window_size=(20, 3), return_attn_probs=True)


def _into_out(q, k, v):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    fa3.flash_attn_func(q, k, v, causal=True, out=out)
    return (out,)


def _one_byte(q, k, v):
    bytes_ = (x.to(E4M3) for x in (q, k, v))
    return fa3.flash_attn_func(*bytes_, causal=True, return_attn_probs=True)


def _in_fp8(q, k, v):
    return fa3.flash_attn_fp8_func(q.half(), k.half(), v.half(), return_attn_probs=True)


def _quantised(q, k, v):
    return tuple(x.float() for x in fa3.quantize_fp8(q, k, v, hadamard=True, smooth_k=True))


CALLS = _sixteen_bits, _into_out, _one_byte, _in_fp8, _quantised


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _within(context):
    def run(call, qkv):
        with context():
            return call(*qkv)

    return run


def _traced(call, qkv):
    """Made of other numbers and lengths."""
    return torch.jit.trace(call, tuple(2 - x[:, :21] for x in qkv))(*qkv)


def _vmapped(call, qkv):
    return tuple(x[1] for x in torch.vmap(call)(*(torch.stack([-x, x]) for x in qkv)))


def _negated(call, qkv):
    """Tensors whose memory holds the opposite numbers."""
    return call(*(torch._neg_view(-x) for x in qkv))


STATES = {
    "device": _within(lambda: torch.device("meta")),
    "dtype": _within(lambda: _default_dtype(torch.float64)),
    "inference": _within(torch.inference_mode),
    "no grad": _within(torch.no_grad),
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "function mode": _within(_Functions),
    "dispatch mode": _within(_Operators),
    "dual level": _within(torch.autograd.forward_ad.dual_level),
    "profiler": _within(torch.autograd.profiler.profile),
    "functionalize": lambda call, qkv: torch.func.functionalize(call)(*qkv),
    "vmap": _vmapped,
    "trace": _traced,
    "negated": _negated,
}


# torch's functionalize knows no custom operator that writes to an argument
REFUSED = {(_into_out, "functionalize")}


def _check(call, state, qkv, monkeypatch):
    wanted = call(*qkv)
    monkeypatch.setattr(scales, "_constants", {})  # made again, in this state
    for given in (STATES[state](call, qkv), call(*qkv)):
        for a, b in zip(given, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_plain_torch(call, state, plain_torch, monkeypatch):
    if (call, state) in REFUSED:
        with pytest.raises(RuntimeError, match="custom .* operator whose output has alias"):
            STATES[state](call, _inputs())
    else:
        _check(call, state, _inputs(), monkeypatch)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_plain_torch_while_products_of_fp32_may_lose_bits(precision, plain_torch):
    """torch.set_float32_matmul_precision: with AMX they are computed in bf16, which costs 5e-2."""
    q, k, v = (torch.randn(1, 256, 2, 128).half() * 2 for _ in range(3))
    wanted, wanted_lse = reference.exact(q, k, v, precision=torch.float64)
    torch.set_float32_matmul_precision(precision)
    try:
        out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2.0**-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("state", ["device", "dtype", "vmap", "trace", "negated"])
@pytest.mark.parametrize("call", [_sixteen_bits, _one_byte], ids=lambda call: call.__name__)
def test_kernels(call, state, device, monkeypatch):
    """They read memory, and see nothing of what torch thinks of it."""
    _check(call, state, [x[:1, :30, :2].to(device) for x in _inputs()], monkeypatch)


FACTORIES = {
    "arange",
    "as_tensor",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "scalar_tensor",
    "tensor",
    "zeros",
}
FA3 = Path(fa3.__file__).parent
COMMANDS = {
    FA3 / x for x in ("emulator/__main__.py", "doctor.py", "warm.py")
}  # nothing surrounds them


def _factory_calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(ast.Name("torch"), name)) if name in FACTORIES:
                yield node


def test_factories_name_device_and_dtype():
    """Else torch's defaults decide, which are the caller's."""
    found = [
        (path, call)
        for path in FA3.rglob("*.py")
        if path not in COMMANDS
        for call in _factory_calls(path)
    ]
    assert len(found) > 5
    missing = [
        f"{path}:{call.lineno}"
        for path, call in found
        if not {"device", "dtype"} <= {keyword.arg for keyword in call.keywords}
    ]
    assert missing == []
