"""Joins independent instructions of one kind into one numpy operation on many registers.

A softmax over an accumulator is some hundred instructions that differ only in their registers.
Between instructions with side effects, plain ones are reordered as their dependencies allow, so
that as many equal ones as possible come together; each group becomes one operation on a
two-dimensional array (registers, lanes).  Results are the same bit for bit.

Only unguarded instructions on 32-bit registers and predicates take part, in segments that whole
warpgroups execute.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..ptx import Instr
from .bits import comparison
from .emitter import Emitter

SMALLEST = 4  # instructions worth an operation of their own

# opcode -> numpy expression of its operands, which are arrays
_FLOAT = {
    "add": "add({0},{1})",
    "sub": "subtract({0},{1})",
    "mul": "multiply({0},{1})",
    "fma": "fma({0},{1},{2})",
    "max": "fmax({0},{1})",
    "min": "fmin({0},{1})",
    "ex2": "exp2({0})",
    "ex2.ftz": "flush(exp2({0}))",
    "neg": "negative({0})",
    "selp": "where({2},{0},{1})",
    "mov": "{0}",
}
_INTEGER = {
    "add": "add({0},{1})",
    "sub": "subtract({0},{1})",
    "max": "maximum({0},{1})",
    "min": "minimum({0},{1})",
    "and": "bitwise_and({0},{1})",
    "or": "bitwise_or({0},{1})",
    "xor": "bitwise_xor({0},{1})",
    "selp": "where({2},{0},{1})",
    "mov": "{0}",
}
_MODIFIERS = {"rn", "ftz", "approx"}
_PACKED = ("f16x2", "bf16x2")
# type -> (array of all registers in Warpgroup, register class, expressions)
_TYPES = {
    "f32": ("floats", "w", _FLOAT),
    "s32": ("ints", "w", _INTEGER),
    "u32": ("words", "w", _INTEGER),
    "b32": ("words", "w", _INTEGER),
}
_PREDICATES = "predicates"


class Row(NamedTuple):
    """A register: a row of one of the Warpgroup's arrays."""

    cls: str
    index: int
    array: str

    def same_register(self) -> tuple[str, int]:
        return self.cls, self.index


@dataclass
class Item:
    """One instruction: its lines, and, if it is plain, what it takes to join it with others."""

    pc: int
    lines: list[str]
    key: tuple | None = None  # equal keys can be joined; None: not plain
    expression: str = ""
    target: Row | None = None
    sources: list[Row | str] = field(default_factory=list)  # str: the name of a constant

    @property
    def reads(self) -> set[tuple[str, int]]:
        return {s.same_register() for s in self.sources if isinstance(s, Row)}


def describe(e: Emitter, instr: Instr, pc: int, lines: list[str]) -> Item:
    """The item of an instruction that was lowered to these lines."""
    item = Item(pc, lines)
    expression, arrays = _form(instr)
    if not expression or instr.pred or len(instr.args) != len(arrays):
        return item
    rows = [_row(e, operand, array) for operand, array in zip(instr.args, arrays, strict=True)]
    if None in rows or not isinstance(rows[0], Row):
        return item
    item.expression, item.target, item.sources = expression, rows[0], rows[1:]
    item.key = (instr.op, *(isinstance(s, str) for s in item.sources))
    return item


def _form(instr: Instr) -> tuple[str, list[str]]:
    """(expression, arrays that the operands are rows of), ("", []) if not plain."""
    parts = instr.parts
    head, kind = parts[0], parts[-1]
    if kind not in _TYPES:
        return "", []
    array, _, expressions = _TYPES[kind]
    if head == "setp":
        expression = comparison(parts[1], kind, "{0}", "{1}") if len(instr.args) == 3 else ""
        if "ftz" in parts:
            expression = _of_flushed(expression)
        return expression, [_PREDICATES, array, array]
    if head == "cvt" and parts[-2] in _PACKED and set(parts[1:-2]) <= {"rn"}:
        return (
            f"convert.pack('{parts[-2]}',('rn',),{{0}}.reshape(-1),{{1}}.reshape(-1),"
            "{0}.size).reshape(-1,w.lanes)"
        ), ["words", array, array]
    expression = expressions.get(head, "")
    if "ftz" in parts and expression:
        expression = expressions.get(f"{head}.ftz") or f"flush({_of_flushed(expression)})"
    if not set(parts[1:-1]) <= _MODIFIERS:
        return "", []
    arrays = [array] * (1 + sum(f"{{{i}}}" in expression for i in range(3)))
    return expression, [*arrays[:-1], _PREDICATES] if head == "selp" else arrays


def _of_flushed(expression: str) -> str:
    """The same of operands whose subnormal values are zeros (.ftz)."""
    for i in range(3):
        expression = expression.replace(f"{{{i}}}", f"flushed({{{i}}})")
    return expression


def _row(e: Emitter, operand: tuple, array: str) -> Row | str | None:
    """A register of the array's class, the name of a constant, or None for anything else."""
    cls = "p" if array == _PREDICATES else "w"
    if operand[0] == "reg" and (r := e.register(operand[1])) and r[0] == cls:
        return Row(*r, array)
    if operand[0] == "f32" and array == "floats":
        return e.src(operand, "f32")
    if operand[0] == "imm" and array in ("ints", "words"):
        return e.src(operand, "s32" if array == "ints" else "u32")
    return None


def bundle(e: Emitter, items: list[Item]) -> list[tuple[int, str]]:
    """[(pc, line)] of a segment's items, joined where that is possible."""
    out: list[tuple[int, str]] = []
    window: list[Item] = []
    for item in [*items, None]:
        if item is not None and item.key:
            window.append(item)
            continue
        out += _schedule(e, window)
        window = []
        if item is not None:
            out += [(item.pc, line) for line in item.lines]
    return out


def _schedule(e: Emitter, window: list[Item]) -> list[tuple[int, str]]:
    """Order plain items by dependency, the largest group of equal ones that are ready first."""
    if len(window) < SMALLEST:
        return [(item.pc, line) for item in window for line in item.lines]
    waiting, followers = _dependencies(window)
    ready = [i for i, n in enumerate(waiting) if n == 0]
    out = []
    while ready:
        counts = Counter(window[i].key for i in ready)
        key = max(counts, key=counts.__getitem__)  # the first of equals: program order
        chosen = [i for i in ready if window[i].key == key]
        ready = [i for i in ready if window[i].key != key]
        out += _join(e, [window[i] for i in chosen])
        for i in chosen:
            for j in followers[i]:
                waiting[j] -= 1
                if waiting[j] == 0:
                    ready.append(j)
        ready.sort()
    return out


def _dependencies(window: list[Item]) -> tuple[list[int], list[list[int]]]:
    """(number of items that must come before each, items that must come after each)"""
    before: list[set[int]] = []
    writer: dict[tuple, int] = {}
    readers: dict[tuple, list[int]] = {}
    for i, item in enumerate(window):
        target = item.target.same_register()
        needs = {writer[r] for r in item.reads if r in writer}
        needs.update(readers.get(target, ()))
        if target in writer:
            needs.add(writer[target])
        before.append(needs)
        for r in item.reads:
            readers.setdefault(r, []).append(i)
        writer[target] = i
        readers[target] = []
    followers: list[list[int]] = [[] for _ in window]
    for i, needs in enumerate(before):
        for j in needs:
            followers[j].append(i)
    return [len(needs) for needs in before], followers


def _join(e: Emitter, group: list[Item]) -> list[tuple[int, str]]:
    if len(group) < SMALLEST:
        return [(item.pc, line) for item in group for line in item.lines]
    packs = group[0].key[0].startswith("cvt")
    sources = [
        _operand(e, [item.sources[p] for item in group], every=packs)
        for p in range(len(group[0].sources))
    ]
    value = group[0].expression.format(*sources)
    rows = _rows(e, [item.target.index for item in group])
    return [(group[0].pc, f"w.{group[0].target.array}[{rows}]={value}")]


def _operand(e: Emitter, sources: list[Row | str], every: bool) -> str:
    """One operand of all instructions of a group; every: a row of its own for each."""
    first = sources[0]
    if isinstance(first, str):
        if len(set(sources)) == 1:
            return first
        return e.bind(np.stack([e.names[s] for s in sources]))
    if not every and len(set(sources)) == 1:
        return f"w.{first.array}[{first.index}]"
    return f"w.{first.array}[{_rows(e, [s.index for s in sources])}]"


def _rows(e: Emitter, registers: list[int]) -> str:
    """Index of register rows: a slice if they are evenly spaced."""
    steps = set(np.diff(registers).tolist())
    if len(steps) == 1 and (step := steps.pop()) > 0:
        return f"{registers[0]}:{registers[-1] + 1}:{step}"
    return e.bind(np.array(registers))
