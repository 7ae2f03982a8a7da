"""Check "uninit" on registers: code that follows which bytes of the watched ones were written.

Only registers that some path reads unwritten are watched (ptx/dataflow.py), of most kernels none
but the accumulators that a wgmma with a false scale-d starts.  Warpgroup.defined has a row for
each: per lane one bit per byte, so that values packed from written and unwritten halves come
apart again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import Uninitialized
from ..ptx import Instr, Kernel
from ..ptx.dataflow import Register, Undefined, Use, results
from ..ptx.model import SIZE
from .emitter import Emitter, vector

_BYTES = {"p": 1, "h": 2, "w": 4, "d": 8}


def _all_bytes(cls: str) -> int:
    return (1 << _BYTES[cls]) - 1


class Watched(NamedTuple):
    """Registers of one instruction."""

    rows: np.ndarray  # of Warpgroup.defined
    whole: np.ndarray  # (registers, 1) their value when all is written
    registers: tuple[Register, ...]


def require(w, m, these: Watched) -> None:
    """The active lanes use registers: all of them must have written these."""
    bad = w.defined[these.rows] != these.whole
    if m is not None:
        bad &= m
    if bad.any():
        lowered = w.launch.lowered
        first = int(bad.any(1).argmax())
        lanes = np.flatnonzero(bad[first]) + w.first_thread
        raise Uninitialized(
            lowered.watch.describe(these.registers[first], int(bad.any(1).sum()), lanes, lowered)
        )


def define(w, m, these: Watched) -> None:
    """The active lanes write registers."""
    if m is None:
        w.defined[these.rows] = these.whole
    else:
        w.defined[np.ix_(these.rows, m)] = these.whole


class Watch:
    def __init__(self, kernel: Kernel):
        self._kernel = kernel
        undefined = Undefined(kernel)
        self.count, self._row, self._uses = (
            len(undefined.watched),
            undefined.watched,
            undefined.uses,
        )

    def __contains__(self, pc: int) -> bool:
        return pc in self._uses

    def emit_guard(self, e: Emitter, instr: Instr) -> None:
        """Before its lanes are chosen by a guard."""
        use = self._uses.get(e.pc)
        if use and (guard := self._guard(instr)) in use.requires:
            self._require(e, (guard,))

    def emit(self, e: Emitter, instr: Instr) -> None:
        """Before an instruction, for the lanes of e.mask."""
        use = self._uses.get(e.pc)
        if use is None:
            return
        guard = self._guard(instr)
        self._require(e, tuple(r for r in use.requires if r != guard))
        if use.accumulates:
            scale = instr.args[3]
            if scale[0] != "imm":
                e.line(f"if {e.pred(scale)}[0]: " + self._call(e, require, use.accumulates))
            else:
                self._require(e, use.accumulates)
        if use.copies:
            self._copy(e, instr, use)
        elif use.defines:
            e.line(self._call(e, define, use.defines))

    def describe(self, register: Register, count: int, threads, lowered) -> str:
        """What is wrong with these threads' use of a register (and count - 1 others)."""
        names = {r: n for n, r in self._kernel.regs.items()}
        more = f" (and {count - 1} more)" if count > 1 else ""
        writers = [
            pc
            for pc, i in enumerate(self._kernel.code)
            if any(self._kernel.regs.get(x[1]) == register for x in _scalars(results(i)))
        ]
        why = "nothing writes it"
        if writers:
            why = f"it is written at {lowered.place(writers[0])}"
        return (
            f"{len(threads)} threads from {threads[0]} on use register {names[register]}{more}, "
            f"which they have not written ({why})"
        )

    def _guard(self, instr: Instr) -> Register | None:
        return self._kernel.regs[instr.pred] if instr.pred else None

    def _call(self, e: Emitter, f, registers: tuple[Register, ...]) -> str:
        rows = np.array([self._row[r] for r in registers])
        whole = np.array([[_all_bytes(cls)] for cls, _ in registers], np.uint8)
        return f"{e.bind(f)}(w,{e.mask},{e.bind(Watched(rows, whole, registers))})"

    def _require(self, e: Emitter, registers: tuple[Register, ...]) -> None:
        if registers:
            e.line(self._call(e, require, registers))

    # copies

    def _copy(self, e: Emitter, instr: Instr, use: Use) -> None:
        """The result is as written as what it is copied from."""
        targets = [(x, self._kernel.regs.get(x[1])) for x in _scalars(instr.args[:1])]
        sizes = [_BYTES[r[0]] for _, r in targets if r]
        value = self._value(e, instr)
        for j, (_, r) in enumerate(targets):
            if r not in use.defines:
                continue
            part = f"({value}>>u1({sum(sizes[:j])}))&u1({_all_bytes(r[0])})"
            e.put(f"w.defined[{self._row[r]}]", part if len(targets) > 1 else value)

    def _value(self, e: Emitter, instr: Instr) -> str:
        """The bytes of the result that are written."""
        args, size = instr.args, {"pred": 1, **SIZE}[instr.parts[-1]]
        if instr.parts[0] == "selp":
            either = (self._bytes(e, x, size) for x in args[1:3])
            return f"where({e.pred(args[3])},{next(either)},{next(either)})"
        if instr.parts[0] == "prmt":
            return self._permuted(e, instr)
        parts = vector(args[1])
        part = size // len(parts)
        texts = [self._bytes(e, x, part) for x in parts]
        if len(parts) == 1:
            return texts[0]
        return "|".join(f"({text}<<u1({part * j}))" for j, text in enumerate(texts))

    def _permuted(self, e: Emitter, instr: Instr) -> str:
        a, b = (self._bytes(e, x, 4) for x in instr.args[1:3])
        both, selector = f"({a}|({b}<<u1(4)))", instr.args[3]
        if selector[0] != "imm" or len(instr.parts) > 2:
            return f"where({both}==u1(255),u1(15),u1(0))"
        picked = (selector[1] >> 4 * j & 7 for j in range(4))
        return "|".join(f"(({both}>>u1({k})&u1(1))<<u1({j}))" for j, k in enumerate(picked))

    def _bytes(self, e: Emitter, operand: tuple, size: int) -> str:
        """Of an operand of `size` bytes."""
        if operand[0] == "not":
            operand = operand[1]
        r = self._kernel.regs.get(operand[1]) if operand[0] == "reg" else None
        return f"w.defined[{self._row[r]}]" if r in self._row else e.constant((1 << size) - 1, "u1")


def _scalars(operands: list) -> list[tuple]:
    """The registers of destination operands, in order."""
    found = []
    for o in operands:
        if o[0] == "vec":
            found += _scalars(o[1])
        elif o[0] == "pair":
            found += _scalars(o[1:])
        elif o[0] == "reg":
            found.append(o)
    return found
