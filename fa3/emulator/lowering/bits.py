"""Bits and predicates: logic, shifts, bit fields, comparisons, selection."""

from __future__ import annotations

from ..errors import Unsupported
from ..numerics import integers
from .emitter import DTYPE, KIND, instr_type, pair
from .registry import lowers


@lowers("and", "or", "xor", "not")
def logic(e, i):
    t, name = instr_type(i), i.parts[0]
    if t == "pred":
        return e.ufunc(f"logical_{name}", e.dst(i.args[0], "u32"), *(e.pred(x) for x in i.args[1:]))
    f = "invert" if name == "not" else f"bitwise_{name}"
    e.ufunc(f, e.dst(i.args[0], t), *(e.src(x, t) for x in i.args[1:]))


@lowers("shl")
def shl(e, i):
    t = instr_type(i)
    e.ufunc("left_shift", e.dst(i.args[0], t), e.src(i.args[1], t), _count(e, i.args[2], t))


@lowers("shr")
def shr(e, i):
    t = instr_type(i)
    e.ufunc("right_shift", e.dst(i.args[0], t), e.src(i.args[1], t), _count(e, i.args[2], t))


def _count(e, operand, t) -> str:
    """A shift count in the type that is shifted; numpy shifts by the width or more as PTX does."""
    if operand[0] == "imm":
        return e.constant(min(operand[1] & 0xFFFFFFFF, 127), DTYPE[t])
    n = e.src(operand, "u32")
    return n if DTYPE[t] == "u4" else f"minimum({n},u4(127)).astype({DTYPE[t]})"


@lowers("shf")
def shf(e, i):
    lo, hi, n = (e.src(x, "u32") for x in i.args[1:])
    e.put(
        e.dst(i.args[0], "u32"),
        f"integers.funnel_shift({lo},{hi},{n},{i.parts[1] == 'l'},{'wrap' in i.parts})",
    )


@lowers("bfe")
def bfe(e, i):
    t = instr_type(i)
    a, pos, n = e.src(i.args[1], t), e.src(i.args[2], "u32"), e.src(i.args[3], "u32")
    e.put(e.dst(i.args[0], t), f"integers.extract_bits({a},{pos},{n})")


@lowers("bfi")
def bfi(e, i):
    t = instr_type(i)
    a, b = e.src(i.args[1], t), e.src(i.args[2], t)
    pos, n = e.src(i.args[3], "u32"), e.src(i.args[4], "u32")
    e.put(e.dst(i.args[0], t), f"integers.insert_bits({a},{b},{pos},{n})")


@lowers("lop3")
def lop3(e, i):
    a, b, c = (e.src(x, "u32") for x in i.args[1:4])
    e.put(e.dst(i.args[0], "u32"), f"integers.lop3({a},{b},{c},{i.args[4][1]})")


@lowers("prmt")
def prmt(e, i):
    mode = i.parts[2] if len(i.parts) > 2 else None
    if mode not in (None, *integers.PERMUTE_MODES):
        raise Unsupported("prmt mode")
    a, b, selector = (e.src(x, "u32") for x in i.args[1:4])
    e.put(e.dst(i.args[0], "u32"), f"integers.permute_bytes({a},{b},{selector},{mode!r})")


@lowers("dp2a", "dp4a")
def dot(e, i):
    """NVVM uses these for address arithmetic."""
    t, u = i.parts[-2:]
    d = "s32" if "s32" in (t, u) else "u32"
    a, b, c = e.src(i.args[1], t), e.src(i.args[2], u), e.src(i.args[3], d)
    width, first = (2 if i.parts[0] == "dp2a" else 1), (2 if "hi" in i.parts else 0)
    e.put(e.dst(i.args[0], d), f"integers.dot({a},{b},{c},{width},{first},w.lanes)")


@lowers("popc")
def popc(e, i):
    e.put(e.dst(i.args[0], "u32"), f"bitwise_count({e.src(i.args[1], instr_type(i))})")


@lowers("clz")
def clz(e, i):
    e.put(e.dst(i.args[0], "u32"), f"integers.leading_zeros({e.src(i.args[1], instr_type(i))})")


@lowers("bfind")
def bfind(e, i):
    x = e.src(i.args[1], instr_type(i))
    e.put(e.dst(i.args[0], "u32"), f"integers.highest_bit({x},{'shiftamt' in i.parts})")


@lowers("brev")
def brev(e, i):
    t = instr_type(i)
    e.put(e.dst(i.args[0], t), f"integers.reverse_bits({e.src(i.args[1], t)})")


@lowers("cnot")
def cnot(e, i):
    t = instr_type(i)
    e.put(e.dst(i.args[0], t), f"({e.src(i.args[1], t)}==0)")


@lowers("bmsk")
def bmsk(e, i):
    first, count = (e.src(x, "u32") for x in i.args[1:])
    e.put(e.dst(i.args[0], "u32"), f"integers.bit_mask({first},{count},{i.parts[1] == 'clamp'})")


@lowers("szext")
def szext(e, i):
    t = instr_type(i)
    a, count = e.src(i.args[1], t), e.src(i.args[2], "u32")
    e.put(e.dst(i.args[0], t), f"integers.extended({a},{count},{i.parts[1] == 'clamp'})")


@lowers("selp")
def selp(e, i):
    t = instr_type(i)
    e.put(
        e.dst(i.args[0], t),
        f"where({e.pred(i.args[3])},{e.src(i.args[1], t)},{e.src(i.args[2], t)})",
    )


@lowers("slct")
def slct(e, i):
    t, u = i.parts[-2:]
    sign = e.src(i.args[3], u)
    sign = f"flushed({sign})" if "ftz" in i.parts else sign
    e.put(e.dst(i.args[0], t), f"where({sign}>=0,{e.src(i.args[1], t)},{e.src(i.args[2], t)})")


_COMPARE = {
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "eq": "equal",
    "ne": "not_equal",
    "lo": "less",
    "ls": "less_equal",
    "hi": "greater",
    "hs": "greater_equal",
}
# comparisons that are true of NaN, by the ordered comparison they negate
_UNORDERED = {"ltu": "greater_equal", "leu": "greater", "gtu": "less_equal", "geu": "less"}


def comparison(cmp: str, t: str, x: str, y: str) -> str:
    """numpy expression of a comparison of two operands of type t."""
    if KIND[t] == "f":
        if cmp in _UNORDERED:
            return f"~{_UNORDERED[cmp]}({x},{y})"
        nan = f"(isnan({x})|isnan({y}))"
        special = {
            "ne": f"not_equal({x},{y})&~{nan}",
            "neu": f"not_equal({x},{y})",
            "equ": f"equal({x},{y})|{nan}",
            "nan": nan,
            "num": f"~{nan}",
        }
        if cmp in special:
            return special[cmp]
    return f"{_COMPARE[cmp]}({x},{y})"


def _compared(e, i, t: str) -> list[str]:
    """The two operands of a comparison."""
    operands = [e.src(x, t) for x in i.args[1:3]]
    return [f"flushed({x})" for x in operands] if "ftz" in i.parts else operands


def _also(e, i) -> str:
    """What a comparison is combined with: a predicate, by .and, .or, .xor."""
    if len(i.args) < 4:
        return ""
    return f"{ {'and': '&', 'or': '|', 'xor': '^'}[i.parts[2]] }{e.pred(i.args[3])}"


@lowers("setp")
def setp(e, i):
    t, cmp = instr_type(i), i.parts[1]
    if t == "bf16" or t.endswith("x2"):
        raise Unsupported("comparison of halves")
    x, y = _compared(e, i, t)
    first, second = pair(i.args[0])
    d = e.dst(first, "u32")
    plain = cmp in _COMPARE and not (KIND[t] == "f" and cmp == "ne")
    if plain and len(i.args) == 3 and second is None and d:
        return e.ufunc(_COMPARE[cmp], d, x, y)
    also = _also(e, i)
    e.line(f"t=({comparison(cmp, t, x, y)})")
    e.put(d, f"t{also}")
    if second is not None:
        e.put(e.dst(second, "u32"), f"(~t){also}")


@lowers("set")
def set_(e, i):
    t = instr_type(i)
    one = "0x3f800000" if i.parts[-2] == "f32" else "0xffffffff"
    truth = f"({comparison(i.parts[1], t, *_compared(e, i, t))}){_also(e, i)}"
    e.put(e.dst(i.args[0], "u32"), f"where({truth},u4({one}),u4(0))")
