"""Opcode -> the function that lowers it."""

from __future__ import annotations

from collections.abc import Callable

from ..ptx import Instr, Kernel
from ..ptx.dataflow import registers, results

HANDLERS: dict[str, Callable] = {}
TERMINATORS: dict[str, Callable] = {}
_IMMEDIATE_FULL_MASKS = (("imm", -1), ("imm", 0xFFFFFFFF))

# whole warps execute these together
_WARP_WIDE = {
    "elect",
    "shfl",
    "vote",
    "match",
    "redux",
    "bar",
    "barrier",
    "ldmatrix",
    "stmatrix",
    "mma",
}
_WITH_MEMBER_MASK = {"elect", "shfl", "vote", "match", "redux"}


def lowers(*opcodes: str):
    """Register f(emitter, instr) for instructions whose opcode starts with one of these."""

    def register(f):
        HANDLERS.update(dict.fromkeys(opcodes, f))
        return f

    return register


def terminates(*opcodes: str):
    """Register f(emitter, instr, after) for instructions that may block, split or leave.

    They end a segment; `after` is the pc of the next instruction.
    """

    def register(f):
        TERMINATORS.update(dict.fromkeys(opcodes, f))
        return f

    return register


def terminator(instr: Instr) -> Callable | None:
    head = instr.parts[0]
    if head == "mbarrier":
        return TERMINATORS[head] if instr.parts[1] in ("try_wait", "test_wait") else None
    return TERMINATORS.get(head)


def full_masks(kernel: Kernel) -> set[tuple]:
    """Operands that name all lanes of a warp: numbers, and registers that hold no other one."""
    full = {}
    for instr in kernel.code:
        is_full = instr.parts[0] == "mov" and instr.args[1] in _IMMEDIATE_FULL_MASKS
        for register in registers(kernel, results(instr)):
            full[register] = full.get(register, True) and is_full
    named = {("reg", name) for name, register in kernel.regs.items() if full.get(register)}
    return named.union(_IMMEDIATE_FULL_MASKS)


def converges(instr: Instr, masks: set[tuple]) -> str | None:
    """Which lanes must have arrived before an instruction: those of the "warp", "warpgroup".

    masks: those that name all lanes.
    """
    head = instr.parts[0]
    if head in ("wgmma", "setmaxnreg"):
        return "warpgroup"
    if head not in _WARP_WIDE:
        return None
    if head in _WITH_MEMBER_MASK and instr.args[-1] not in masks:
        return None  # a partial membermask: trust the program
    return "warp"
