"""Integer instructions in every width and signedness they have, against Python's integers.

Each runs for all lanes of a warpgroup and, guarded, for the odd ones.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from .ptx_runner import lanes

ALL = ("u16", "s16", "u32", "s32", "u64", "s64")
SIGNED = ("s16", "s32", "s64")
BITS = ("b16", "b32", "b64")
EDGES = [
    0,
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    2**15 - 1,
    2**15,
]
EDGES += [2**16 - 1, 2**16, 2**23, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1]
EDGES += [2**63, 2**64 - 1, 2**64 - 2]
RNG = np.random.default_rng(11)


def numbers(shift: int) -> np.ndarray:
    edges = np.array(EDGES[shift:] + EDGES[:shift], np.uint64)
    return np.concatenate([edges, edges[::-1], edges, RNG.integers(0, 2**64, 128, np.uint64)])[:128]


A, B, C = numbers(0), numbers(7), numbers(19)
REGISTER = {16: "%rs", 32: "%r", 64: "%rd"}


def width(t: str) -> int:
    return int(t[1:].removesuffix("x2"))


def value(x: int, t: str) -> int:
    bits = width(t)
    x &= (1 << bits) - 1
    return x - (1 << bits) if t[0] == "s" and x >> bits - 1 else x


def limits(t: str) -> tuple[int, int]:
    bits = width(t)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if t[0] == "s" else (0, (1 << bits) - 1)


def saturated(x: int, t: str) -> int:
    low, high = limits(t)
    return min(max(x, low), high)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def low24(x: int, t: str) -> int:
    return value(x, t[0] + "24")


def extract(x: int, at: int, n: int, t: str) -> int:
    """bfe, by the loop of the manual."""
    at, n, top = at & 255, n & 255, width(t) - 1
    bits = x & (1 << top + 1) - 1
    sign = 0 if t[0] == "u" or n == 0 else bits >> min(at + n - 1, top) & 1
    return sum(
        (bits >> at + i & 1 if i < n and at + i <= top else sign) << i for i in range(top + 1)
    )


def insert(a: int, b: int, at: int, n: int, t: str) -> int:
    """bfi, by the loop of the manual."""
    at, n, top = at & 255, n & 255, width(t) - 1
    for i in range(n):
        if at + i <= top:
            b = b & ~(1 << at + i) | (a >> i & 1) << at + i
    return b


def first_bit(x: int) -> int:
    """bfind: of the highest bit that differs from the sign."""
    return (~x if x < 0 else x).bit_length() - 1


def mask(at: int, n: int, clamp: bool) -> int:
    at, n = (at, n) if clamp else (at % 32, n % 32)
    return sum(1 << i for i in range(32) if at <= i < at + n)


def extended(x: int, n: int, t: str, clamp: bool) -> int:
    n = min(n, 32) if clamp else n % 32
    return value(x, f"{t[0]}{n}") if n else 0


def pairs(f: Callable) -> Callable:
    """f for both halves of packed pairs."""

    def both(*x):
        *x, t = x
        parts = ([value(v >> 16 * i, t) for v in x] for i in range(2))
        low, high = (f(*of_half) & 0xFFFF for of_half in parts)
        return low | high << 16

    return both


class Instruction(NamedTuple):
    """`model` gets the operands, read as the types `operands` say, and the type."""

    op: str  # the type comes last, or where {} is
    types: tuple[str, ...]
    model: Callable[..., int]
    operands: tuple[str, ...] = ("", "")  # "": the type of the instruction
    result: Callable[[str], int] = width  # bits
    divides: bool = False


def opcode(instruction: Instruction, t: str) -> str:
    return instruction.op.format(t) if "{}" in instruction.op else f"{instruction.op}.{t}"


def wide(t: str) -> int:
    return 2 * width(t)


def word(t: str) -> int:
    return 32


one, three = ("",), ("", "", "")
PACKED = ("u16x2", "s16x2")
TABLE = [
    Instruction("add", ALL, lambda a, b, t: a + b),
    Instruction("sub", ALL, lambda a, b, t: a - b),
    Instruction("add.sat", ("s32",), lambda a, b, t: saturated(a + b, t)),
    Instruction("sub.sat", ("s32",), lambda a, b, t: saturated(a - b, t)),
    Instruction("mul.lo", ALL, lambda a, b, t: a * b),
    Instruction("mul.hi", ALL, lambda a, b, t: a * b >> width(t)),
    Instruction("mul.wide", ALL[:4], lambda a, b, t: a * b, result=wide),
    Instruction("mad.lo", ALL, lambda a, b, c, t: a * b + c, three),
    Instruction("mad.hi", ALL, lambda a, b, c, t: (a * b >> width(t)) + c, three),
    Instruction("mad.hi.sat", ("s32",), lambda a, b, c, t: saturated((a * b >> 32) + c, t), three),
    Instruction("mul24.lo", ALL[2:4], lambda a, b, t: low24(a, t) * low24(b, t)),
    Instruction("mul24.hi", ALL[2:4], lambda a, b, t: low24(a, t) * low24(b, t) >> 16),
    Instruction("mad24.lo", ALL[2:4], lambda a, b, c, t: low24(a, t) * low24(b, t) + c, three),
    Instruction(
        "mad24.hi.sat",
        ("s32",),
        lambda a, b, c, t: saturated(value(low24(a, t) * low24(b, t) >> 16, t) + c, t),
        three,
    ),
    Instruction("sad", ALL, lambda a, b, c, t: c + abs(a - b), three),
    Instruction("div", ALL, lambda a, b, t: quotient(a, b), divides=True),
    Instruction("rem", ALL, lambda a, b, t: a - quotient(a, b) * b, divides=True),
    Instruction("abs", SIGNED, lambda a, t: abs(a), one),
    Instruction("neg", SIGNED, lambda a, t: -a, one),
    Instruction("min", ALL, lambda a, b, t: min(a, b)),
    Instruction("max", ALL, lambda a, b, t: max(a, b)),
    Instruction("min.relu", ("s32",), lambda a, b, t: max(min(a, b), 0)),
    Instruction("max.relu", ("s32",), lambda a, b, t: max(a, b, 0)),
    Instruction("popc", BITS[1:], lambda a, t: a.bit_count(), one, word),
    Instruction("clz", BITS[1:], lambda a, t: width(t) - a.bit_length(), one, word),
    Instruction("bfind", ALL[2:], lambda a, t: first_bit(a), one, word),
    Instruction(
        "bfind.shiftamt",
        ALL[2:],
        lambda a, t: -1 if first_bit(a) < 0 else width(t) - 1 - first_bit(a),
        one,
        word,
    ),
    Instruction("brev", BITS[1:], lambda a, t: int(f"{a:0{width(t)}b}"[::-1], 2), one),
    Instruction("bfe", ALL[2:], extract, ("", "u32", "u32")),
    Instruction("bfi", BITS[1:], insert, ("", "", "u32", "u32")),
    Instruction("bmsk.clamp", ("b32",), lambda a, b, t: mask(a, b, True)),
    Instruction("bmsk.wrap", ("b32",), lambda a, b, t: mask(a, b, False)),
    Instruction("szext.clamp", ALL[2:4], lambda a, b, t: extended(a, b, t, True), ("", "u32")),
    Instruction("szext.wrap", ALL[2:4], lambda a, b, t: extended(a, b, t, False), ("", "u32")),
    Instruction("and", BITS, lambda a, b, t: a & b),
    Instruction("or", BITS, lambda a, b, t: a | b),
    Instruction("xor", BITS, lambda a, b, t: a ^ b),
    Instruction("not", BITS, lambda a, t: ~a, one),
    Instruction("cnot", BITS, lambda a, t: int(a == 0), one),
    Instruction("shl", BITS, lambda a, n, t: a << min(n, 64), ("", "u32")),
    Instruction("shr", BITS + ALL, lambda a, n, t: a >> min(n, 64), ("", "u32")),
    Instruction("slct.{}.s32", BITS + ALL, lambda a, b, c, t: a if c >= 0 else b, ("", "", "s32")),
    Instruction("add", PACKED, pairs(lambda a, b: a + b)),
    Instruction("min", PACKED, pairs(min)),
    Instruction("max", PACKED, pairs(max)),
]
FORMS = [(x, t) for x in TABLE for t in x.types]


def run(body: str, result: int) -> list[int]:
    """The value of %rs8, %r9 or %rd5 after a body, by the width of the result, which runs twice:
    for all lanes, and for the odd ones, of which it is the second value."""
    inputs = "".join(
        f"cvt.u32.u64 %r{i}, %rd{i}; cvt.u16.u64 %rs{i}, %rd{i};\n" for i in range(1, 4)
    )
    d = {16: "%rs8", 32: "%r9", 64: "%rd5"}[result]
    other = {16: "%rs7", 32: "%r8", 64: "%rd4"}[result]
    inputs += "and.b32 %r7, %r0, 1; setp.eq.u32 %p1, %r7, 1;\n"
    guarded = f"mov.b{result} {other}, {d}; mov.b{result} {d}, 0; @%p1 {body}\n"
    text = f"{inputs}{body}\n{guarded}@!%p1 mov.b{result} {d}, {other};\n"
    extend = f"cvt.u64.u{result} %rd6, {d};" if result < 64 else "mov.b64 %rd6, %rd5;"
    return lanes(text + extend, "%rd6", (A, B, C), size=8).tolist()


def names(types) -> list[str]:
    return [f"{REGISTER[32 if t.endswith('x2') else width(t)]}{i}" for i, t in enumerate(types, 1)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: opcode(*form))
def test_integers(form):
    instruction, t = form
    packed = t.endswith("x2")
    types = [x or t for x in instruction.operands]
    result = 32 if packed else instruction.result(t)
    registers = {16: "%rs8", 32: "%r9", 64: "%rd5"}
    # the fourth operand of bfi, its length, is the second one again
    sources = [*names(types[:3]), "%r2"][: len(types)]
    found = run(f"{opcode(*form)} {', '.join([registers[result], *sources])};", result)
    for i, inputs in enumerate(zip(A.tolist(), B.tolist(), C.tolist(), strict=True)):
        inputs = [*inputs, inputs[1]][: len(types)]
        operands = inputs if packed else [value(x, u) for x, u in zip(inputs, types, strict=True)]
        if instruction.divides and operands[1] == 0:
            continue
        expected = instruction.model(*operands, t) & (1 << result) - 1
        assert found[i] == expected, (i, operands)


INTEGERS = ("u8", "s8", *ALL)


@pytest.mark.parametrize("source", INTEGERS)
def test_conversions(source):
    """To every type, cut and saturated."""
    own = f"%{ {8: 'rs', 16: 'rs', 32: 'r', 64: 'rd'}[width(source)] }1"
    for target, sat in itertools.product(INTEGERS, ("", ".sat")):
        bits = max(width(target), 16)
        d = {16: "%rs8", 32: "%r9", 64: "%rd5"}[bits]
        found = run(f"cvt{sat}.{target}.{source} {d}, {own};", bits)
        for x, y in zip(A.tolist(), found, strict=True):
            exact = value(x, source)
            expected = saturated(exact, target) if sat else value(exact, target)
            assert y == expected & (1 << bits) - 1, (target, sat, exact)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("t", BITS + ALL)
def test_comparisons(t):
    """setp and set, the latter also combined with a predicate."""
    chosen = {op: f for op, f in COMPARISONS.items() if t[0] != "b" or op in ("eq", "ne")}
    if t[0] == "u":
        chosen.update({op: COMPARISONS[same] for op, same in UNSIGNED.items()})
    x, y = names([t, t])
    for op, f in chosen.items():
        expected = [
            f(value(a, t), value(b, t)) for a, b in zip(A.tolist(), B.tolist(), strict=True)
        ]
        found = run(f"set.{op}.u32.{t} %r9, {x}, {y};", 32)
        assert found == [0xFFFFFFFF * right for right in expected], op
        found = run(f"set.{op}.and.u32.{t} %r9, {x}, {y}, %p1;", 32)
        odd = [i % 2 for i in range(128)]
        assert found == [0xFFFFFFFF * (a and b) for a, b in zip(expected, odd, strict=True)], op
        picked = lanes(
            f"cvt.u32.u64 %r1, %rd1; cvt.u16.u64 %rs1, %rd1; cvt.u32.u64 %r2, %rd2;"
            f"cvt.u16.u64 %rs2, %rd2; setp.{op}.{t} %p1, {x}, {y}; selp.{t} {x}, {x}, {y}, %p1;"
            + (f"cvt.u64.u{width(t)} %rd6, {x};" if width(t) < 64 else f"mov.b64 %rd6, {x};"),
            "%rd6",
            (A, B),
            size=8,
        )
        low = (1 << width(t)) - 1
        both = zip(A.tolist(), B.tolist(), expected, strict=True)
        assert picked.tolist() == [(a if right else b) & low for a, b, right in both], op


FLOATS = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 126.6, 127.5, -129.0, 300.0, 65535.5, -70000.0]
FLOATS += [2.0**31, -(2.0**31), 3e9, 2.0**32, 2.0**63, -(2.0**63), 2.0**64, 1e30, -1e30]
FLOATS += [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", ALL)
def test_floats_to_integers_saturate(source, target):
    given = np.array(FLOATS, {"f32": np.float32, "f64": np.float64}[source])
    own = "%r1" if source == "f32" else "%rd1"
    d = {16: "%rs8", 32: "%r9", 64: "%rd6"}[width(target)]
    extend = f"cvt.u64.u{width(target)} %rd6, {d};" if width(target) < 64 else ""
    found = lanes(f"cvt.rzi.{target}.{source} {d}, {own};{extend}", "%rd6", (given,), size=8)
    for x, y in zip(given.tolist(), found.tolist(), strict=False):
        if x != x:
            expected = 1 << width(target) - 1 if source == "f64" or width(target) == 64 else 0
        elif abs(x) == float("inf"):
            expected = limits(target)[x > 0]
        else:
            expected = saturated(int(x), target)
        assert y == expected & (1 << width(target)) - 1, x


ATOMICS = {
    "add": (("u32", "s32", "u64"), lambda a, b: a + b),
    "min": (ALL[2:], min),
    "max": (ALL[2:], max),
    "and": (BITS[1:], lambda a, b: a & b),
    "or": (BITS[1:], lambda a, b: a | b),
    "xor": (BITS[1:], lambda a, b: a ^ b),
    "exch": (BITS[1:], lambda a, b: b),
}


@pytest.mark.parametrize("op, t", [(op, t) for op, (types, _) in ATOMICS.items() for t in types])
def test_atomics(op, t):
    """The lanes change one word in order; each gets what it was before."""
    bits = width(t)
    old, own, d = {32: ("%r8", "%r1", "%r9"), 64: ("%rd5", "%rd1", "%rd6")}[bits]
    start = 2**bits - 77
    body = f"""cvt.u32.u64 %r1, %rd1; mov.u32 %r3, buffer; setp.eq.u32 %p1, %r0, 0;
        mov.b{bits} {d}, {start}; @%p1 st.shared.b{bits} [%r3], {d}; bar.sync 0;
        atom.shared.{op}.{t} {old}, [%r3], {own}; mov.b{bits} {d}, {old};"""
    extend = "cvt.u64.u32 %rd6, %r9;" if bits == 32 else ""
    found = lanes(body + extend, "%rd6", (A,), size=8).tolist()
    expected, now = [], value(start, t)
    for x in A.tolist():
        expected.append(now & (1 << bits) - 1)
        now = value(ATOMICS[op][1](now, value(x, t)), t)
    assert found == expected
