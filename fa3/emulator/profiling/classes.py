"""Classes of PTX instructions, and what a straight stretch of them amounts to.

PTX is not SASS: ptxas removes moves, fuses, and expands divisions.  `fa3 inspect` counts SASS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..ptx import Instr
from . import clock

CLASSES = {
    "mma": "wgmma.mma_async, mma",
    "exp2": "ex2",
    "mufu": "other functions: lg2 rcp sqrt rsqrt tanh sin cos, float division",
    "float": "float add sub mul fma and the like",
    "compare": "float min max, comparisons, selections",
    "integer": "integer arithmetic, logic, bits",
    "move": "mov, addresses, ld.param",
    "convert": "cvt",
    "shared": "ld, st and atomics on shared memory",
    "matrix": "ldmatrix, stmatrix",
    "global": "ld, st and atomics on other memory",
    "copy": "bulk and tensor copies, cp.async, prefetches",
    "sync": "barriers, fences, commits and waits",
    "warp": "shfl vote match redux elect",
    "control": "branches and the rest",
}
_FUNCTIONS = {"lg2", "rcp", "sqrt", "rsqrt", "tanh", "sin", "cos"}
_ARITHMETIC = {"add", "sub", "mul", "mad", "sad", "fma", "abs", "neg", "copysign", "rem", "div"}
_COMPARISONS = {"min", "max", "setp", "set", "selp", "slct"}
_BITS = set(
    "and or xor not cnot shl shr shf bfe bfi bmsk szext lop3 prmt dp2a dp4a popc clz bfind brev "
    "mul24 mad24".split()
)
_MOVES = {"mov", "cvta", "isspacep", "mapa", "getctarank"}
_WARP = {"shfl", "vote", "match", "redux", "elect", "activemask"}
_SYNC = {"mbarrier", "bar", "barrier", "fence", "membar", "setmaxnreg", "griddepcontrol"}
_FLOAT = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32")
_OF_OPCODE = (
    ({"ex2"}, "exp2"),
    (_FUNCTIONS, "mufu"),
    (_BITS, "integer"),
    (_MOVES, "move"),
    ({"cvt"}, "convert"),
    ({"ldmatrix", "stmatrix"}, "matrix"),
    ({"mma"}, "mma"),
    (_SYNC, "sync"),
    (_WARP, "warp"),
    ({"prefetch", "prefetchu", "tensormap"}, "copy"),
)


def class_of(instr: Instr) -> str:
    """A key of CLASSES."""
    head = instr.parts[0]
    for opcodes, name in _OF_OPCODE:
        if head in opcodes:
            return name
    if head in _ARITHMETIC or head in _COMPARISONS:
        return _of_arithmetic(head, instr.parts[-1] in _FLOAT)
    if head == "wgmma":
        return "mma" if instr.parts[1] == "mma_async" else "sync"
    if head == "cp":
        return "sync" if {"commit_group", "wait_group", "wait_all"} & set(instr.parts) else "copy"
    if head in ("ld", "ldu", "st", "atom", "red"):
        return _of_memory(instr.parts)
    return "control"


def _of_arithmetic(head: str, is_float: bool) -> str:
    if not is_float:
        return "integer"
    if head == "div":
        return "mufu"
    return "compare" if head in _COMPARISONS else "float"


def _of_memory(parts: tuple[str, ...]) -> str:
    if any(p.startswith("shared") for p in parts):
        return "shared"
    return "move" if any(p.startswith("param") for p in parts) else "global"


def is_event(instr: Instr) -> bool:
    """Whether its moment matters: a copy, or something that others or it wait for."""
    head = instr.parts[0]
    if head == "wgmma":
        return instr.parts[1] in ("commit_group", "wait_group")
    return head in ("cp", "mbarrier", "bar", "barrier", "st") and (
        head != "st" or instr.parts[1] == "async"
    )


@dataclass(frozen=True)
class Stretch:
    """Straight code, as one warp executes it."""

    classes: Counter
    exponentials: int  # results of one lane
    cycles: float  # nominal

    @classmethod
    def of(cls, code: Iterable[Instr]) -> Stretch:
        code = list(code)
        classes = Counter(class_of(i) for i in code)
        exponentials = sum(_results(i) for i in code if i.parts[0] == "ex2")
        units = Counter(issue=sum(n for c, n in classes.items() if c not in clock.FREE))
        for name, n in classes.items():
            if name in clock.UNITS:
                unit, cycles = clock.UNITS[name]
                units[unit] += cycles * n
        units["mufu"] += clock.UNITS["exp2"][1] * (exponentials - classes["exp2"])
        units["tensor"] = sum(_mma_cycles(i) for i in code if i.parts[0] == "mma")
        return cls(classes, exponentials, max(units.values()))


def _results(instr: Instr) -> int:
    return 2 if instr.parts[-1].endswith("x2") else 1


def mma_flops(m: int, n: int, k: int) -> int:
    return 2 * m * n * k


def mma_shape(instr: Instr) -> tuple[int, int, int]:
    """(m, n, k) of mma.sync"""
    shape = next(p for p in instr.parts if p.startswith("m16n8k"))
    return 16, 8, int(shape[6:])


def _mma_cycles(instr: Instr) -> float:
    m, n, k = mma_shape(instr)
    a = instr.args[1]
    registers = len(a[1]) if a[0] == "vec" else 1
    width = 4 * 32 * registers // (m * k)  # bytes of an element of A, which a warp's lanes share
    return mma_flops(m, n, k) / clock.MMA_FLOPS[width] * clock.SUB_PARTITIONS
