"""Which instructions a warp issues in one steady iteration: which branches it takes.

Every wait is met at the first try, so spin loops fall through, and branches on the result of a
try_wait are known; so are those around what one elected lane does, as its warp goes the way with
it. The others jump forward over a block, and a static listing does not say how often. In the steady
state

- a block that the straight way round leaves out (see fa3.inspect.loops: no matrix product, next to
  no exponentials), such as the rescaling of O that only a new maximum needs, is jumped over, unless
  it holds a named barrier that the others count on, or a copy that adds to memory;
- a block that waits for K or V is executed by the first warpgroup only.

`rescale_always=True` executes the first kind in every iteration, as a kernel without the branch
would: the lower limit, reached when every block of keys brings a new maximum. Where such code lies
around the steady loop and not in it, the loop to trace is that one, `MainLoop.around`.
"""

import re
from dataclasses import replace

from ..loops import MainLoop
from ..sass import Instruction, Program

TAKEN = "BRA.TAKEN"
Trace = list[Instruction]


def trace(program: Program, loop: MainLoop, warp: int, rescale_always: bool = False) -> Trace:
    """One iteration of the warp of warpgroup `warp`, taken branches with the opcode TAKEN.

    Raises ValueError for a loop whose straight way runs through code placed behind it.
    """
    if max(loop.path) > loop.latch:
        raise ValueError(f"the loop at {program.code[loop.head].address:#x} goes on out of line")
    code, steps, i = program.code, [], loop.head
    straight = set(loop.path)
    met: set[str] = set()  # predicates that hold a successful try_wait, or of the elected lane
    while i < loop.latch:
        x, target = code[i], program.target(i)
        _follow_predicates(x, met)
        taken = False
        if target is not None and i < target <= loop.latch:
            skipped = range(i + 1, target)
            known = _known(x, met)
            if known is not None:
                taken = known
            elif _waits(program, skipped):
                taken = warp > 0
            elif not rescale_always:
                taken = _skippable(program, skipped, straight)
        steps.append(replace(x, opcode=TAKEN) if taken else x)
        i = target if taken else i + 1
    return [*steps, replace(code[loop.latch], opcode=TAKEN)]


def _follow_predicates(x: Instruction, met: set[str]) -> None:
    if "TRYWAIT" in x.opcode or x.base == "ELECT":
        met.add(x.operands.split(",")[0].strip())
    elif not x.opcode.startswith("SYNCS"):
        written = re.match(r"((?:U?P\w+, )*)", x.operands).group()
        met -= set(written.replace(",", " ").split())


def _known(x: Instruction, met: set[str]) -> bool | None:
    """Whether the branch is taken, if it is unconditional or depends on such a predicate alone."""
    name = x.predicate.lstrip("@") or x.operands.split("`")[0].strip(", ")
    if name.lstrip("!") in met or not name:
        return not name.startswith("!")
    return None


def _waits(program: Program, positions: range) -> bool:
    code = [program.code[i] for i in positions]
    return any("TRYWAIT" in x.opcode for x in code) and not any(x.is_mma for x in code)


def _skippable(program: Program, positions: range, straight: set[int]) -> bool:
    kept = ("BAR", "UBLKRED")
    return not any(i in straight or program.code[i].base in kept for i in positions)
