"""Which registers instructions read and write; which may be read before they are written."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from .model import Instr, Kernel

Register = tuple[str, int]  # class and index

_NO_RESULT = {
    "st", "stmatrix", "red", "bra", "ret", "exit", "trap", "bar", "barrier", "fence", "membar",
    "cp", "wgmma", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "nanosleep", "call",
    "tensormap", "applypriority", "discard", "pmevent", "brkpt",
}  # fmt: skip
_LEAVES = ("ret", "exit", "trap")
# Compilers move undefined values around; nothing depends on one until something else uses it.
_COPIES = {"mov", "selp", "prmt"}


def registers(kernel: Kernel, operands: Iterable) -> list[Register]:
    """Those named anywhere in some operands."""
    found, todo = [], list(operands)
    while todo:
        o = todo.pop()
        if o[0] == "reg":
            if r := kernel.regs.get(o[1]):
                found.append(r)
            continue
        for x in o[1:]:
            if isinstance(x, tuple):
                todo.append(x)
            elif isinstance(x, list):
                todo.extend(x)
    return found


def results(instr: Instr) -> list:
    """The operands that an instruction writes; of a wgmma: adds to."""
    head, args = instr.parts[0], instr.args
    if instr.parts[:2] == ("wgmma", "mma_async"):
        return args[:1]
    if head in _NO_RESULT or not args or args[0][0] in ("mem", "map", "raw"):
        return []
    return args[:1]


class Use(NamedTuple):
    """An instruction, by what it does to registers that may be undefined."""

    requires: tuple[Register, ...] = ()
    accumulates: tuple[Register, ...] = ()
    """Required only if the scale-d of a wgmma is true."""
    defines: tuple[Register, ...] = ()
    copies: bool = False  # its result is as undefined as its sources


class _Effect(NamedTuple):
    """Sets of registers, as bits; a copy requires only its predicate, not what it copies."""

    required: int
    added: int  # required only if the scale-d of a wgmma is true
    copied: int
    written: int
    guarded: bool


class Undefined:
    """A forward analysis over all paths of a kernel: what has to be watched when it runs.

    watched: register -> row.  uses: pc -> Use, where a watched register is concerned.
    """

    def __init__(self, kernel: Kernel):
        self._kernel = kernel
        self._bit = {r: 1 << i for i, r in enumerate(dict.fromkeys(kernel.regs.values()))}
        self._register = list(self._bit)
        self._effects = [self._effect(i) for i in kernel.code]
        self._before = self._solve()
        self.watched: dict[Register, int] = {}
        self.uses: dict[int, Use] = {}
        self._watch()

    def _set(self, operands) -> int:
        bits = 0
        for r in registers(self._kernel, operands):
            bits |= self._bit[r]
        return bits

    def _effect(self, instr: Instr) -> _Effect:
        written = results(instr)
        sources = instr.args[1:] if written else instr.args
        guard = self._set([("reg", instr.pred)]) if instr.pred else 0
        if instr.parts[0] in _COPIES:
            count = 1 if instr.parts[0] == "mov" else 2  # then a predicate or selector
            required, copied = self._set(sources[count:]), self._set(sources[:count])
            return _Effect(guard | required, 0, copied, self._set(written), bool(guard))
        added = 0
        if instr.parts[:2] == ("wgmma", "mma_async") and instr.args[3] != ("imm", 0):
            added = self._set(written)
        return _Effect(guard | self._set(sources), added, 0, self._set(written), bool(guard))

    def _after(self, pc: int, undefined: int) -> int:
        effect = self._effects[pc]
        if effect.copied & undefined:
            return undefined | effect.written
        return undefined if effect.guarded else undefined & ~effect.written

    def _next(self, pc: int) -> list[int]:
        instr, labels = self._kernel.code[pc], self._kernel.labels
        after = []
        if instr.parts[0] == "bra":
            after.append(labels[instr.args[0][1]])
        if instr.pred or instr.parts[0] not in (*_LEAVES, "bra"):
            after.append(pc + 1)
        return [x for x in after if x < len(self._kernel.code)]

    def _solve(self) -> list[int]:
        """The registers that may be undefined before each instruction."""
        count = len(self._kernel.code)
        before, reached = [0] * count, [False] * count
        if count:
            before[0] = (1 << len(self._bit)) - 1
        todo = [0][:count]  # in the order of the code, mostly that of execution
        while todo:
            pc = heapq.heappop(todo)
            reached[pc] = True
            after = self._after(pc, before[pc])
            for following in self._next(pc):
                if not reached[following] or after & ~before[following]:
                    before[following] |= after
                    if following not in todo[:1]:
                        heapq.heappush(todo, following)
        return before

    def _members(self, bits: int) -> tuple[Register, ...]:
        found = []
        while bits:
            low = bits & -bits
            found.append(self._register[low.bit_length() - 1])
            bits ^= low
        return tuple(found)

    def _watch(self) -> None:
        watched = 0
        for before, effect in zip(self._before, self._effects, strict=True):
            watched |= before & (effect.required | effect.added)
        if not watched:
            return
        copies = [
            (effect.written, effect.copied & before)
            for before, effect in zip(self._before, self._effects, strict=True)
            if effect.copied & before
        ]
        known = 0
        while known != watched:  # whatever is copied into something watched is watched too
            known = watched
            for written, copied in copies:
                watched |= copied if written & watched else 0
        self.watched = {r: i for i, r in enumerate(self._members(watched))}
        for pc, effect in enumerate(self._effects):
            before = self._before[pc] & watched
            use = Use(
                self._members(effect.required & before),
                self._members(effect.added & before),
                self._members(effect.written & (watched if effect.copied & before else before)),
                bool(effect.copied & before and effect.written & watched),
            )
            if any(use):
                self.uses[pc] = use
