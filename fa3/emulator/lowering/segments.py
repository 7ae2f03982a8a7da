"""Cuts a kernel into straight-line segments and compiles each to a Python function.

A segment starts where a fragment is and ends at a label, at an instruction that may block, split
or leave, or, if lanes are missing, before one that whole warps execute together.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import Unsupported
from ..execution import fragments, report
from ..profiling.classes import is_event
from ..ptx import Kernel
from ..ptx.dataflow import registers
from .bundles import Item, bundle, describe
from .emitter import Emitter
from .registry import HANDLERS, converges, full_masks, terminator
from .watch import Watch

_ACCESSES = {"ld", "st", "atom", "red", "ldmatrix", "stmatrix", "cp", "mbarrier", "wgmma"}
_BANKS = "USFDQEHJGP"
_FAILURES = (NotImplementedError, KeyError, AttributeError, TypeError, ValueError, IndexError)


@dataclass(slots=True)
class Segment:
    run: Callable  # (warpgroup, fragment) -> next pc or -1
    length: int  # instructions
    touched: frozenset = frozenset()  # 32-bit registers named, if the check wants to know
    written: frozenset = frozenset()
    operands: frozenset = frozenset()  # those touched that wgmmas use
    instructions: list = field(default_factory=list)  # (pc, touched, written) of each

    def registers(self) -> Iterator[tuple[int, frozenset, frozenset]]:
        return iter(self.instructions)


class Form(NamedTuple):
    """What a kernel is lowered for."""

    tracked: bool = False  # registers are noted, wgmma instructions have segments of their own
    fine: bool = False  # a segment starts at every access to memory: others may run before it
    watch: bool = False  # see watch.py
    profiled: bool = False  # a segment ends after whatever takes time, of which a profile is told


PLAIN = Form()


def _instruments() -> dict[Callable, Callable]:
    from ..profiling.instruments import INSTRUMENTS

    return INSTRUMENTS


def lower(kernel: Kernel, form: Form = PLAIN) -> Lowered:
    """The segments of a kernel, kept with it."""
    if form not in kernel.lowered:
        kernel.lowered[form] = Lowered(kernel, form)
    return kernel.lowered[form]


class Lowered:
    """Segments by starting pc: `whole` for all lanes of a warpgroup, `masked` for some."""

    def __init__(self, kernel: Kernel, form: Form):
        self.kernel, self._form = kernel, form
        self.whole: dict[int, Segment] = {}
        self.masked: dict[int, Segment] = {}
        self.watch = Watch(kernel) if form.watch else None
        self._emitter = Emitter(kernel, _instruments() if form.profiled else {})
        self._leaders = set(kernel.labels.values())
        masks = full_masks(kernel)
        self._converges = [converges(i, masks) for i in kernel.code] + [None]
        self._pcs: dict[object, list[int]] = {}  # code object -> pc of each source line

    @functools.cached_property
    def _of_wgmmas(self) -> frozenset:
        """Registers that wgmmas use."""
        products = (i for i in self.kernel.code if i.parts[:2] == ("wgmma", "mma_async"))
        return frozenset().union(*(self._named(i.args[:2]) for i in products))

    def place(self, pc: int) -> str:
        return report.place(self.kernel.code[pc])

    def executed(self) -> set[int]:
        """The instructions in segments that were run."""
        segments = [*self.whole.items(), *self.masked.items()]
        return {
            i for pc, s in segments for i in range(pc, min(pc + s.length, len(self._converges)))
        }

    def converges(self, pc: int) -> str | None:
        return self._converges[pc]

    def pc_of(self, error: BaseException) -> int | None:
        """The instruction whose generated code an exception passed through."""
        found, traceback = None, error.__traceback__
        while traceback is not None:
            if pcs := self._pcs.get(traceback.tb_frame.f_code):
                found = pcs[traceback.tb_lineno - 1]
            traceback = traceback.tb_next
        return found

    def pc_here(self) -> int:
        """The instruction whose generated code is calling."""
        frame = sys._getframe(1)
        while frame is not None:
            if pcs := self._pcs.get(frame.f_code):
                return pcs[frame.f_lineno - 1]
            frame = frame.f_back
        return 0

    def keys(self) -> set[tuple[int, bool]]:
        """(pc, whether for all lanes) of each segment so far."""
        return {(pc, True) for pc in self.whole} | {(pc, False) for pc in self.masked}

    def segment(self, pc: int, whole: bool) -> Segment:
        return (self.whole if whole else self.masked).get(pc) or self.build(pc, whole)

    def build(self, pc: int, whole: bool) -> Segment:
        body, end = self._body(pc, whole)
        segment = self._compile(pc, whole, body, max(1, end - pc))
        if self._form.tracked:
            self._note_registers(segment, range(pc, end))
        (self.whole if whole else self.masked)[pc] = segment
        return segment

    def _body(self, start: int, whole: bool) -> tuple[list[tuple[int, str]], int]:
        """([(pc, line of source)], pc after the segment)

        wgmmas are left to be joined until something names their registers or the segment ends
        (see matrix/wgmma.py).
        """
        items: list[Item] = []
        unfinished: frozenset = frozenset()  # registers of wgmmas issued so far
        pc = start
        while True:
            stop = self._stop(pc, start, whole)
            lines, last = ([stop], True) if stop else self._lower(pc, whole)
            if unfinished and (last or self._uses(pc, unfinished)):
                items.append(Item(pc, ["w.wgmma.flush()"]))
                unfinished = frozenset()
            joined = whole and not last and not self._watched(pc)
            items.append(
                describe(self._emitter, self.kernel.code[pc], pc, lines)
                if joined
                else Item(pc, lines)
            )
            if last:
                return bundle(self._emitter, items), pc if stop else pc + 1
            unfinished |= self._issues(pc)
            pc += 1

    def _stop(self, pc: int, start: int, whole: bool) -> str | None:
        """The return statement of a segment that ends before pc."""
        if pc >= len(self.kernel.code):
            return f"return {self._emitter.bind(fragments.leave)}(w,fr)"
        if pc != start and self._starts_new(pc, whole):
            return f"return {pc}"
        return None

    def _watched(self, pc: int) -> bool:
        return self.watch is not None and pc in self.watch

    def _uses(self, pc: int, registers: frozenset) -> bool:
        instr = self.kernel.code[pc]
        return instr.parts[0] != "wgmma" and bool(registers & self._named(instr.args))

    def _issues(self, pc: int) -> frozenset:
        """The registers of a wgmma that is to be executed later."""
        instr = self.kernel.code[pc]
        joined = instr.parts[:2] == ("wgmma", "mma_async") and not self._form.tracked
        return self._named(instr.args) if joined else frozenset()

    def _starts_new(self, pc: int, whole: bool) -> bool:
        if pc in self._leaders or (not whole and self._converges[pc]):
            return True
        code = self.kernel.code
        if self._form.profiled and is_event(code[pc - 1]):
            return True
        if self._form.fine and code[pc].parts[0] in _ACCESSES and "param" not in code[pc].parts:
            return True
        return self._form.tracked and "wgmma" in (code[pc].parts[0], code[pc - 1].parts[0])

    def _lower(self, pc: int, whole: bool) -> tuple[list[str], bool]:
        """(lines, whether the instruction ends the segment)"""
        emitter, instr = self._emitter, self.kernel.code[pc]
        emitter.begin(pc, None if whole else "m")
        end, watched = terminator(instr), self._watched(pc)
        try:
            if watched:
                self.watch.emit_guard(emitter, instr)
            if instr.pred and (watched or not end):
                guard = ("~" if instr.neg else "") + f"P[{emitter.register(instr.pred)[1]}]"
                emitter.line(f"m1={guard}" if whole else f"m1={guard}&m")
                emitter.mask = "m1"
            if watched:
                self.watch.emit(emitter, instr)
            if end:
                emitter.mask = None if whole else "m"
                end(emitter, instr, pc + 1)
            else:
                HANDLERS[instr.parts[0]](emitter, instr)
        except _FAILURES as e:
            why = e if isinstance(e, Unsupported) else f"{type(e).__name__}: {e}"
            error = Unsupported(f"instruction not emulated: {instr.text}  [{why}]")
            error.site = pc
            raise error from e
        return emitter.lines, end is not None

    def _compile(self, start: int, whole: bool, body, length: int) -> Segment:
        text = "\n ".join(line for _, line in body)
        banks = ";".join(f"{b}=w.{b}" for b in _BANKS if f"{b}[" in text)
        head = [banks or "pass"] + ([] if whole else ["m=fr.mask"])
        source = "\n ".join(["def segment(w,fr):", *head, text, ""])
        name = f"<{self.kernel.name[:40]} pc {start} {'whole' if whole else 'masked'}>"
        exec(compile(source, name, "exec"), self._emitter.names)
        run = self._emitter.names.pop("segment")
        self._pcs[run.__code__] = [start] * (1 + len(head)) + [pc for pc, _ in body] + [start]
        return Segment(run, length)

    def _note_registers(self, segment: Segment, pcs: range) -> None:
        for pc in pcs:
            instr = self.kernel.code[pc]
            if instr.parts[0] == "wgmma":
                continue
            touched, written = self._named(instr.args), self._named(instr.args[:1])
            if instr.parts[0].startswith("st"):
                written = frozenset()
            segment.instructions.append((pc, touched, written))
        segment.touched = frozenset().union(*(t for _, t, _ in segment.instructions))
        segment.written = frozenset().union(*(x for _, _, x in segment.instructions))
        segment.operands = segment.touched & self._of_wgmmas

    def _named(self, operands: list) -> frozenset:
        """32-bit registers among operands."""
        return frozenset(i for cls, i in registers(self.kernel, operands) if cls == "w")
