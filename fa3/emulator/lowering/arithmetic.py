"""Arithmetic: add sub mul mad sad fma div rem neg abs min max, and the functions of the MUFU."""

from __future__ import annotations

from ..errors import Unsupported
from .emitter import DTYPE, KIND, Emitter, instr_type
from .registry import lowers

_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _is_half(t: str) -> bool:
    """bf16 and the packed pairs, which numpy cannot compute in."""
    return t.endswith("x2") or t == "bf16"


def _saturates(i) -> bool:
    """Of integers; only s32 does."""
    return "sat" in i.parts and KIND[instr_type(i)] != "f" and not _is_half(instr_type(i))


def flushes(i) -> bool:
    return "ftz" in i.parts and instr_type(i) != "f64"


def _elementwise(e: Emitter, i, for_floats: str, for_integers: str) -> None:
    t = instr_type(i)
    d, sources = e.dst(i.args[0], t), [e.src(x, t) for x in i.args[1:]]
    f = f"flushing({for_floats})" if flushes(i) else for_floats
    if _is_half(t):
        return e.put(d, f"halves.apply({f},'{t}',{','.join(sources)})")
    if _saturates(i):
        return e.put(d, f"integers.saturated({for_integers},{','.join(sources)})")
    if flushes(i):
        e.put(d, f"{f}({','.join(sources)})")
    else:
        e.ufunc(f if KIND[t] == "f" else for_integers, d, *sources)
    if "sat" in i.parts and KIND[t] == "f":
        e.put(d, f"fmin(fmax({d},{DTYPE[t]}(0)),{DTYPE[t]}(1))")


_ELEMENTWISE = {"add": "add", "sub": "subtract", "neg": "negative", "abs": "absolute"}


@lowers(*_ELEMENTWISE)
def elementwise(e, i):
    if "cc" in i.parts:
        raise Unsupported("carry")
    f = _ELEMENTWISE[i.parts[0]]
    _elementwise(e, i, f, f)


def _product(e, i) -> str:
    """Source of the (whole, low or high) product of the first two operands."""
    t = instr_type(i)
    a, b = e.src(i.args[1], t), e.src(i.args[2], t)
    if i.parts[1] == "wide":
        wide = DTYPE[_WIDE[t]]
        return f"multiply({a}.astype({wide}),{b}.astype({wide}))"
    return f"integers.mulhi({a},{b})" if i.parts[1] == "hi" else f"multiply({a},{b})"


@lowers("mul")
def mul(e, i):
    if i.parts[1] in ("wide", "hi"):
        t = _WIDE[instr_type(i)] if i.parts[1] == "wide" else instr_type(i)
        return e.put(e.dst(i.args[0], t), _product(e, i))
    _elementwise(e, i, "multiply", "multiply")


@lowers("mad")
def mad(e, i):
    t = instr_type(i)
    if KIND[t] == "f":
        return fma(e, i)
    t = _WIDE[t] if i.parts[1] == "wide" else t
    d, product, c = e.dst(i.args[0], t), _product(e, i), e.src(i.args[3], t)
    if _saturates(i):
        return e.put(d, f"integers.saturated(add,{product},{c})")
    e.ufunc("add", d, product, c)


@lowers("mul24", "mad24")
def mul24(e, i):
    t = instr_type(i)
    a, b = e.src(i.args[1], t), e.src(i.args[2], t)
    d, product = e.dst(i.args[0], t), f"integers.product_of_24_bits({a},{b},{i.parts[1] == 'hi'})"
    if i.parts[0] == "mul24":
        return e.put(d, product)
    c = e.src(i.args[3], t)
    e.put(d, f"integers.saturated(add,{product},{c})" if _saturates(i) else f"add({product},{c})")


@lowers("sad")
def sad(e, i):
    t = instr_type(i)
    a, b, c = (e.src(x, t) for x in i.args[1:])
    e.put(e.dst(i.args[0], t), f"add({c},integers.difference({a},{b}))")


@lowers("fma")
def fma(e, i):
    t = instr_type(i)
    a, b, c = (e.src(x, t) for x in i.args[1:])
    d = e.dst(i.args[0], t)
    if t == "f32" and flushes(i):
        e.put(d, f"flushing(fma)({a},{b},{c})")
    elif t == "f32":
        e.put(d, f"fma({a},{b},{c})")
    elif t == "f64":
        e.put(d, f"{a}*{b}+{c}")
    else:
        e.put(d, f"halves.fma('{t}',{a},{b},{c},{'relu' in i.parts},{flushes(i)})")
    if "sat" in i.parts and t == "f32":
        e.put(d, f"fmin(fmax({d},f4(0)),f4(1))")


@lowers("div")
def div(e, i):
    t = instr_type(i)
    if KIND[t] == "f":
        return _elementwise(e, i, "divide", "")
    e.put(e.dst(i.args[0], t), f"integers.divide({e.src(i.args[1], t)},{e.src(i.args[2], t)})")


@lowers("rem")
def rem(e, i):
    t = instr_type(i)
    a, b = e.src(i.args[1], t), e.src(i.args[2], t)
    e.put(e.dst(i.args[0], t), f"{a}-integers.divide({a},{b})*{b}")


@lowers("copysign")
def copysign(e, i):
    """The sign of a on the magnitude of b."""
    t = instr_type(i)
    e.ufunc("copysign", e.dst(i.args[0], t), e.src(i.args[2], t), e.src(i.args[1], t))


@lowers("min", "max")
def min_max(e, i):
    """Of floats, NaN loses unless .NaN is given."""
    t = instr_type(i)
    name = i.parts[0]
    f = f"{name}imum" if "NaN" in i.parts or KIND[t] != "f" and not _is_half(t) else f"f{name}"
    d, sources = e.dst(i.args[0], t), [e.src(x, t) for x in i.args[1:]]
    f = f"flushing({f})" if flushes(i) else f
    if _is_half(t):
        return e.put(d, f"halves.apply({f},'{t}',{','.join(sources)})")
    if len(sources) == 2 and "relu" not in i.parts and not flushes(i):
        return e.ufunc(f, d, *sources)
    value = sources[0]
    for x in sources[1:]:
        value = f"{f}({value},{x})"
    e.put(d, f"maximum({value},{e.constant(0, DTYPE[t])})" if "relu" in i.parts else value)


_FUNCTIONS = {
    "ex2": "exp2",
    "lg2": "log2",
    "rcp": "reciprocal",
    "sqrt": "sqrt",
    "tanh": "tanh",
    "sin": "sin",
    "cos": "cos",
}


@lowers(*_FUNCTIONS)
def function(e, i):
    f = _FUNCTIONS[i.parts[0]]
    if i.parts[0] == "ex2" and "ftz" in i.parts and i.parts[-1] == "f32":  # of tiny values is 1
        return e.put(e.dst(i.args[0], "f32"), f"flush(exp2({e.src(i.args[1], 'f32')}))")
    _elementwise(e, i, f, f)


@lowers("rsqrt")
def rsqrt(e, i):
    t = instr_type(i)
    f = "flushing(inverse_sqrt)" if flushes(i) else "inverse_sqrt"
    e.put(e.dst(i.args[0], t), f"{f}({e.src(i.args[1], t)})")
