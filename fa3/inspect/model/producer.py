"""What a producer warp does beside the consumers: loads, and the transpose of V in shared memory.

8-bit matrix products take only operands whose rows run along k, so V is transposed after its
arrival: LDSM, byte permutes, STSM. Beside 16-bit Q bytes of K and V are widened: LDS, conversions,
STS. These instructions share the issue slots of the sub-partition and the bandwidth of shared
memory with the consumers.
"""

import re
from dataclasses import dataclass, replace

from ..flow import Flow, NaturalLoop
from ..loops import cheapest_way
from ..sass import Instruction, Program
from .machine import Machine
from .ops import LANES, SUB_PARTITIONS, Op, decode_all, loaded_bytes, registers_hold_a
from .trace import TAKEN, Trace

WARPS = 3  # that transpose: one of the producer's four issues the copies
AHEAD = 2  # blocks of V that wait transposed
WIDENS = "E4M3.UNPACK"  # in the name of the instruction that does
MATRIX_BYTES = 128  # an 8 x 8 matrix of 16-bit pairs, of which LDSM and STSM move up to four


@dataclass(frozen=True)
class Transpose:
    """One way round the producer's loop that reads and writes V, or K and V, in shared memory."""

    head: int  # address
    latch: int  # address
    steps: Trace
    bytes: int  # that one warp writes on this way

    @property
    def widens(self) -> bool:
        return any(WIDENS in x.opcode for x in self.steps)

    @property
    def what(self) -> str:
        return "widening of K and V" if self.widens else "transpose of V"

    def share(self, made: int, warps: int) -> Trace:
        """What each of `warps` warps issues to write so many bytes."""
        rounds = made / (warps * self.bytes)
        whole = int(rounds)
        return self.steps * whole + self.steps[: round((rounds - whole) * len(self.steps))]


@dataclass(frozen=True)
class Beside:
    """The producer's part in one iteration."""

    steps: Trace = ()  # of one warp, on a sub-partition that has one
    warps: int = WARPS  # of the SM that do the same
    ahead: int = AHEAD  # iterations that they may be before the consumers

    def ops(self, machine: Machine) -> list[Op]:
        """Named barriers are free: they join warps of the producer.

        A sub-partition has a quarter of the bandwidth of shared memory; where not every one has
        such a warp, those that have one get more.
        """
        found = decode_all(self.steps, machine, 0)
        for op in found:
            op.kind = "control" if op.kind in ("turn", "pass", "meet") else op.kind
            op.busy, op.smem = (
                (x * self.warps / SUB_PARTITIONS if op.smem else x) for x in (op.busy, op.smem)
            )
        return found


def transpose(program: Program) -> Transpose | None:
    """The loop that transposes or widens, without matrix products; None where there is none.

    Of several the one with the fewest instructions per byte: the others are beginnings and ends.
    """
    flow = Flow(program)
    found = [loop for loop in flow.loops if _transposes(_code(flow, loop.blocks))]
    inner = [a for a in found if not any(b.blocks < a.blocks for b in found)]
    ways = [_way(flow, loop) for loop in inner]
    return min(ways, key=lambda way: len(way.steps) / way.bytes, default=None)


def loaded_per_step(program: Program) -> int | None:
    """Bytes that the producer's loop expects to arrive, per time round; None where it is not clear.

    A barrier is told the bytes of what will complete it (SYNCS.ARRIVE of a number), and ptxas puts
    the number into a register close ahead.
    """
    flow = Flow(program)
    found = [loop for loop in flow.loops if _loads(_code(flow, loop.blocks))]
    inner = [a for a in found if not any(b.blocks < a.blocks for b in found)]
    return max((_expected(_code(flow, loop.blocks)) for loop in inner), default=0) or None


def v_bytes(trace: Trace) -> int:
    """Bytes of V in one iteration: the B operands of products whose A, which is P, is registers."""
    return sum(loaded_bytes(x) for x in trace if x.is_mma and registers_hold_a(x))


def _code(flow: Flow, blocks) -> list[Instruction]:
    return [flow.program.code[i] for block in sorted(blocks) for i in flow.blocks[block].positions]


def _transposes(code: list[Instruction]) -> bool:
    bases = {x.base for x in code}
    moves = {"LDSM", "STSM"} <= bases
    widens = "STS" in bases and any(WIDENS in x.opcode for x in code)
    return (moves or widens) and not any(x.is_mma for x in code)


def _loads(code: list[Instruction]) -> bool:
    return any(x.base == "UTMALDG" for x in code) and not any(x.is_mma for x in code)


def _expected(code: list[Instruction]) -> int:
    numbers, total = {}, 0
    for x in code:
        if match := re.fullmatch(r"(R\d+), (?:RZ, RZ, )?(0x[0-9a-f]+)", x.operands):
            numbers[match[1]] = int(match[2], 16)
        elif x.opcode == "SYNCS.ARRIVE.TRANS64":
            total += numbers.get(x.operands.rsplit(", ", 1)[-1], 0)
    return total


def _way(flow: Flow, loop: NaturalLoop) -> Transpose:
    def cost(block: int) -> tuple[float, ...]:
        code = _code(flow, [block])
        return -sum(map(_stored, code)), len(code)

    code = flow.program.code
    path = [i for block in cheapest_way(flow, loop, cost) for i in flow.blocks[block].positions]
    following = [*path[1:], path[0]]
    steps = [
        replace(code[i], opcode=TAKEN) if code[i].is_branch and j != i + 1 else code[i]
        for i, j in zip(path, following, strict=True)
    ]
    first, last = code[path[0]].address, code[path[-1]].address
    return Transpose(first, last, steps, sum(map(_stored, steps)))


def _stored(x: Instruction) -> int:
    """Bytes that a warp's STSM writes, or its STS, of 16 bytes a lane."""
    if x.base == "STS":
        return LANES * 16 if ".128" in x.opcode else 0
    if x.base != "STSM":
        return 0
    count = x.opcode.rsplit(".", 1)[-1]
    return MATRIX_BYTES * (int(count) if count in ("2", "4") else 1)
