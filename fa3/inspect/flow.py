"""Control flow of a kernel: basic blocks, dominators, natural loops."""

from dataclasses import dataclass

from .sass import Instruction, Program


@dataclass(frozen=True)
class Block:
    """A run of instructions that is entered at its first and left at its last."""

    first: int  # position in the program's code
    last: int  # inclusive
    successors: tuple[int, ...]  # indices of blocks

    @property
    def positions(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class NaturalLoop:
    """The blocks that can reach a back edge of `header` without passing through it."""

    header: int  # index of the block that every iteration enters
    latches: tuple[int, ...]  # blocks that jump back to it
    blocks: frozenset[int]


class Flow:
    """The blocks of one kernel, in program order; block 0 is the entry."""

    def __init__(self, program: Program):
        self.program = program
        self.blocks = _blocks(program)
        self.order = _reverse_postorder(self.blocks)
        self.dominators = _dominators(self.blocks, self.order)
        self.loops = self._loops()

    def dominates(self, a: int, b: int) -> bool:
        """Every way from the entry to block `b` passes through block `a`."""
        return bool(self.dominators[b] >> a & 1)

    def block_of(self, position: int) -> int:
        return next(i for i, block in enumerate(self.blocks) if position in block.positions)

    def _loops(self) -> tuple[NaturalLoop, ...]:
        latches: dict[int, list[int]] = {}
        for i in self.order:
            for target in self.blocks[i].successors:
                if self.dominates(target, i):
                    latches.setdefault(target, []).append(i)
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for i in self.order:
            for target in self.blocks[i].successors:
                predecessors[target].append(i)
        loops = []
        for header, ends in sorted(latches.items()):
            inside, todo = {header}, list(ends)
            while todo:
                block = todo.pop()
                if block not in inside:
                    inside.add(block)
                    todo += predecessors[block]
            loops.append(NaturalLoop(header, tuple(sorted(ends)), frozenset(inside)))
        return tuple(loops)


def _ends_block(program: Program, position: int) -> bool:
    instruction = program.code[position]
    return instruction.is_branch or instruction.base in ("EXIT", "RET", "BSYNC", "KILL")


def _blocks(program: Program) -> tuple[Block, ...]:
    last = len(program.code) - 1
    starts = {0, *(position for position in program.labels.values() if position <= last)}
    starts |= {i + 1 for i in range(last) if _ends_block(program, i)}
    first = sorted(starts)
    index = {position: i for i, position in enumerate(first)}
    blocks = []
    for start, following in zip(first, [*first[1:], last + 1], strict=True):
        targets = _targets(program, following - 1)
        successors = [index[target] for target in targets if target in index]
        blocks.append(Block(start, following - 1, tuple(dict.fromkeys(successors))))
    return tuple(blocks)


def _targets(program: Program, position: int) -> list[int]:
    """Where control may go after the last instruction of a block."""
    x = program.code[position]
    if x.base == "BSYNC":
        return [_meeting_point(program, position)]
    targets = []
    if x.is_branch:
        names = [x.label] if x.label else x.note.removeprefix("BRANCH_TARGETS ").split(",")
        targets = [program.labels[name] for name in names if name in program.labels]
    leaves = x.is_branch or x.base in ("EXIT", "RET", "KILL")
    if not leaves or _conditional(x):
        targets.append(position + 1)
    return targets


def _meeting_point(program: Program, position: int) -> int:
    """Where the threads that wait at a BSYNC go on: what the last BSSY of its barrier named."""
    barrier = program.code[position].operands.strip()
    for x in reversed(program.code[:position]):
        if x.base == "BSSY" and x.operands.split(",")[0] == barrier:
            return program.labels.get(x.label, position + 1)
    return position + 1


def _conditional(instruction: Instruction) -> bool:
    """Predicated, or a branch with its predicate as an operand (BRA P0; BRA.DIV UR4)."""
    operand = instruction.operands.split("`")[0].strip(", ")
    return bool(instruction.predicate) or (instruction.base == "BRA" and operand != "")


def _reverse_postorder(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    """Reachable blocks, each before what only it leads to."""
    seen, order, stack = {0}, [], [(0, iter(blocks[0].successors))]
    while stack:
        block, successors = stack[-1]
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].successors)))
                break
        else:
            order.append(block)
            stack.pop()
    return tuple(reversed(order))


def _dominators(blocks: tuple[Block, ...], order: tuple[int, ...]) -> list[int]:
    """For each block the set of its dominators as bits; unreachable blocks have none."""
    predecessors: list[list[int]] = [[] for _ in blocks]
    for i in order:
        for successor in blocks[i].successors:
            predecessors[successor].append(i)
    everything = (1 << len(blocks)) - 1
    sets = [0] * len(blocks)
    for i in order:
        sets[i] = everything
    sets[0] = 1
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            new = everything
            for p in predecessors[i]:
                new &= sets[p]
            new |= 1 << i
            changed |= new != sets[i]
            sets[i] = new
    return sets
