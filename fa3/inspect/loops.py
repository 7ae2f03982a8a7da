"""The main loops of an attention kernel and what one iteration of each issues.

A main loop is an innermost natural loop with both matrix products and exponentials. A kernel has
one per phase (masked, unmasked, window edge); the steady loop, where a long sequence spends its
time, is the one with the fewest issue slots per exponential.

Branches make "one iteration" ambiguous, so there are two figures and they are always named:

    straight   the shortest way round that still issues every matrix product and every block of
               exponentials: what a branch may jump over (the rescaling of O, a repeated wait) is
               left out
    all        every instruction from the loop's head to its last back branch, taken or not, and
               what lies outside of that range but belongs to the loop, except spinning on a wait

Rare code may also lie around the loop: a branch leaves it, and an enclosing loop without matrix
products of its own enters it again. That loop is `around`, measured the same way, so that code does
not vanish from the figures by being moved out of the innermost loop.

A block counts as a block of exponentials from an eighth of the loop's MUFU.EX2 on; the one or two
of a skipped rescale factor do not make it part of the straight way.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .flow import Flow, NaturalLoop
from .mix import Mix
from .sass import Instruction, Program

WORK_SHARE = 8  # a block with one part in 8 of the loop's exponentials is work


@dataclass(frozen=True)
class Skipped:
    """A run of instructions in the loop that the straight way leaves out."""

    first: int  # address
    last: int  # address
    mix: Mix
    out_of_line: bool  # behind the loop's last instruction


@dataclass(frozen=True)
class MainLoop:
    head: int  # position of the first instruction
    latch: int  # position of the last back branch
    straight: Mix
    all: Mix
    skipped: tuple[Skipped, ...]
    path: tuple[int, ...]  # positions on the straight way, in order of execution
    around: "MainLoop | None"  # the enclosing loop, if it does no more of the work than this one


def main_loops(flow: Flow) -> tuple[MainLoop, ...]:
    """All main loops, the steady one first, the others in order of slots per exponential."""
    found = [loop for loop in flow.loops if _attends(flow, loop)]
    inner = [a for a in found if not any(b is not a and b.blocks < a.blocks for b in found)]
    loops = [replace(_measure(flow, loop), around=_around(flow, loop)) for loop in inner]
    return tuple(sorted(loops, key=lambda x: (x.straight.per_exponential, x.head)))


def loops_beside(flow: Flow) -> tuple[MainLoop, ...]:
    """Innermost loops with matrix products and no exponentials, in the order of the code.

    Of warps that share the steps of a main loop, and leave the exponentials to others.
    """
    found = [loop for loop in flow.loops if any(x.is_mma for x in _code(flow, loop.blocks))]
    inner = [a for a in found if not any(b is not a and b.blocks < a.blocks for b in found)]
    return tuple(_measure(flow, loop) for loop in inner if not _attends(flow, loop))


def _around(flow: Flow, loop: NaturalLoop) -> MainLoop | None:
    enclosing = [other for other in flow.loops if loop.blocks < other.blocks]
    if not enclosing:
        return None
    next_one = min(enclosing, key=lambda other: len(other.blocks))
    mmas = [sum(x.is_mma for x in _code(flow, a.blocks)) for a in (loop, next_one)]
    return _measure(flow, next_one) if mmas[0] == mmas[1] else None


def _code(flow: Flow, blocks) -> list[Instruction]:
    return [flow.program.code[i] for block in sorted(blocks) for i in flow.blocks[block].positions]


def _attends(flow: Flow, loop: NaturalLoop) -> bool:
    code = _code(flow, loop.blocks)
    return any(x.is_mma for x in code) and any(x.is_exp2 for x in code)


def _measure(flow: Flow, loop: NaturalLoop) -> MainLoop:
    blocks, program = flow.blocks, flow.program
    head = blocks[loop.header].first
    latch = max(blocks[i].last for i in loop.latches)
    path = straight_path(flow, loop)
    on_path = [i for block in path for i in blocks[block].positions]
    skipped = [
        _describe(program, blocks[i].first, blocks[i].last, latch)
        for i in sorted(loop.blocks - set(path))
        if blocks[i].first <= latch or not _spins(flow, loop, i)
    ]
    outside = [i for i in loop.blocks if blocks[i].first > latch and not _spins(flow, loop, i)]
    return MainLoop(
        head=head,
        latch=latch,
        straight=Mix.of(program.code[i] for i in on_path),
        all=Mix.of([*program.code[head : latch + 1], *_code(flow, outside)]),
        skipped=tuple(skipped),
        path=tuple(on_path),
        around=None,
    )


def _describe(program: Program, first: int, last: int, latch: int) -> Skipped:
    code = program.code[first : last + 1]
    return Skipped(code[0].address, code[-1].address, Mix.of(code), first > latch)


def _spins(flow: Flow, loop: NaturalLoop, block: int) -> bool:
    """Part of an inner loop around a wait, or nothing but the jump back from one."""
    inner = any(
        block in other.blocks and other.blocks < loop.blocks and not _attends(flow, other)
        for other in flow.loops
    )
    return inner or all(x.is_branch or x.base == "NOP" for x in _code(flow, [block]))


def straight_path(flow: Flow, loop: NaturalLoop) -> tuple[int, ...]:
    """The blocks of the shortest way round that issues the most work; see the module's text."""
    mixes = {i: Mix.of(_code(flow, [i])) for i in loop.blocks}
    work = sum(mix.exponentials for mix in mixes.values()) / WORK_SHARE

    def cost(i: int) -> tuple[int, float, int]:
        exponentials = mixes[i].exponentials
        return -mixes[i].mmas, -exponentials if exponentials >= work else 0, mixes[i].slots

    return cheapest_way(flow, loop, cost)


def cheapest_way(
    flow: Flow, loop: NaturalLoop, cost: Callable[[int], tuple[float, ...]]
) -> tuple[int, ...]:
    """The blocks of the way from the loop's head to a latch with the least sum of costs."""
    best = {loop.header: (cost(loop.header), (loop.header,))}
    for i in flow.order:
        if i not in best:
            continue
        for successor in flow.blocks[i].successors:
            if successor not in loop.blocks or flow.dominates(successor, i):
                continue
            total = tuple(a + b for a, b in zip(best[i][0], cost(successor), strict=True))
            if successor not in best or total < best[successor][0]:
                best[successor] = (total, (*best[i][1], successor))
    return min(best[latch] for latch in loop.latches)[1]
