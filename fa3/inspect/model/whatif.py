"""Edits of a trace, for changes that are not written yet.

A change of tile, registers or overlap is better compiled and predicted as it is.
"""

import re
from collections import deque
from dataclasses import replace

from ..sass import Control, Instruction
from .trace import Trace

# A polynomial exponential: nine instructions, two of which read two registers.
POLYNOMIAL = ("FFMA",) * 7 + ("LOP3",) * 2
TWO_READS = (3, 8)


def drop_rescale(trace: Trace) -> Trace:
    """Without the FMULs that scale the accumulator of O in place."""
    accumulator: set[int] = set()
    for x in trace:
        if x.is_mma and "RZ, !UPT" not in x.operands:
            first = int(re.match(r"R(\d+)", x.operands)[1])
            # P V takes A from registers, or V transposed
            if re.match(r"R\d+, R\d+", x.operands) or ".tnspB" in x.operands:
                accumulator |= set(range(first, first + x.mma_shape[1] // 2))

    def rescales(x: Instruction) -> bool:
        match = re.match(r"R(\d+), R(\d+)(?:\.reuse)?, R", x.operands)
        in_place = x.opcode == "FMUL" and match and match[1] == match[2]
        return bool(in_place and int(match[1]) in accumulator)

    return [x for x in trace if not rescales(x)]


def emulate_ex2(trace: Trace, fraction: float) -> Trace:
    """A fraction of MUFU.EX2 replaced by arithmetic, interleaved with what follows."""
    out: Trace = []
    due: deque[Instruction] = deque()
    credit = 0.0
    for x in trace:
        if x.opcode == "MUFU.EX2":
            credit += fraction
            if credit >= 1 - 1e-9:
                credit -= 1
                due.extend(_polynomial(x))
                continue
        out.append(x)
        if due and not x.is_mma and not x.is_branch:
            _fill_gap(out, due)
    tail = [out.pop()] if out[-1].is_branch else []
    return out + list(due) + tail


def _polynomial(x: Instruction):
    """Stands for `x` and waits for what it waited for."""
    for k, opcode in enumerate(POLYNOMIAL):
        operands = "RZ, R900, R901" if k in TWO_READS else "RZ, R900"
        wait = x.control.wait if k == 0 else 0
        yield Instruction(x.address, "", opcode, operands, Control(wait=wait))


def _fill_gap(out: Trace, due: deque[Instruction]) -> None:
    """Place what is due into the cycles that the compiler left after the last instruction."""
    last = out[-1]
    stall = last.control.stall
    if stall <= 1:
        out.append(due.popleft())
        return
    count = min(len(due), stall - 1)
    out[-1] = replace(last, control=replace(last.control, stall=1))
    out += [due.popleft() for _ in range(count)]
    final = out[-1]
    out[-1] = replace(final, control=replace(final.control, stall=stall - count))


def no_barriers(trace: Trace) -> Trace:
    """Without named barriers."""
    return [x for x in trace if x.base != "BAR"]
