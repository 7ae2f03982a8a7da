"""Instructions as the machine sees them: pipe, cycles, registers read."""

import re
from dataclasses import dataclass

from ..sass import Instruction
from .machine import Machine
from .trace import TAKEN, Trace

VECTOR = ("fma", "heavy", "alu", "xu", "lsu", "sums")  # kinds that read vector registers
KIND_OF = {
    base: kind
    for kind, bases in {
        "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2",
        "heavy": "IMAD IDP",  # one of the two FMA halves only
        "xu": "MUFU F2I I2F F2F POPC FRND",
        "lsu": "LDS STS LDSM STSM SHFL LDL STL LDG STG ATOMS LDC MOVM SYNCS",
        "sums": "RED REDG",
        "copy": "UBLKRED",
        "copied": "DEPBAR",
        "uniform": "R2UR S2UR VOTEU",
        "control": "BRA NOP BSSY BSYNC WARPSYNC NANOSLEEP YIELD EXIT WARPGROUP CALL RET FENCE "
        "ERRBAR MEMBAR CCTL BMOV ELECT S2R CS2R BAR",
    }.items()
    for base in bases.split()
}
SMEM = ("LDS", "STS", "LDSM", "STSM", "LDL", "STL", "ATOMS")
SUB_PARTITIONS = 4
LANES = 32
COPY_UNIT = 16  # bytes
CONSTANT = re.compile(r"(UR\d+), (0x[0-9a-f]+)")  # ptxas puts a copy's size there close ahead of it
REGISTER = re.compile(r"(?<![UA-Z])R(\d+)(\.reuse)?")


@dataclass
class Op:
    kind: str  # fma heavy alu xu uniform lsu sums copy copied mma depbar branch control, or a named
    # barrier: turn and pass of a ping-pong, meet of all consumers
    stall: int
    write_barrier: int
    read_barrier: int
    wait: int
    latency: int
    busy: float = 0  # pipe cycles
    flops: int = 0  # of the whole warpgroup, of attention
    last: bool = False  # ends a group of MMAs
    keep: int = 0  # groups of MMAs, or copies, that a DEPBAR may leave pending
    reads: int = 0  # registers read, beyond those that the reuse cache holds
    smem: float = 0  # shared-memory cycles; of an MMA: the fraction of its time


def decode(x: Instruction, machine: Machine, consumers: int = 2) -> Op:
    c = x.control
    op = Op(_kind(x), c.stall, c.write_barrier, c.read_barrier, c.wait, machine.lat_other)
    if op.kind == "mma":
        _decode_mma(op, x, machine)
    elif op.kind in ("depbar", "copied"):
        op.keep = int(x.operands.split(",")[-1], 16)
    elif x.base == "BAR":
        op.kind = _barrier_kind(x, consumers)
    elif op.kind in ("fma", "heavy"):
        op.busy = machine.fma
    elif op.kind == "lsu":
        _decode_memory(op, x, machine)
    elif op.kind == "sums":
        op.busy = SUB_PARTITIONS * summed_bytes(x) / machine.l2_sums
    elif op.kind in ("alu", "xu", "uniform"):
        op.busy = getattr(machine, op.kind)
        if op.kind == "xu":
            op.latency = machine.lat_xu
    return op


def decode_all(trace: Trace, machine: Machine, consumers: int) -> list[Op]:
    """With the registers that each op reads.

    An operand is free when the instruction before kept the same register in the same slot.
    """
    ops, kept, sizes = [], {}, {}
    for x in trace:
        op = decode(x, machine, consumers)
        if match := CONSTANT.fullmatch(x.operands):
            sizes[match[1]] = COPY_UNIT * int(match[2], 16)
        if op.kind == "copy":
            size = sizes.get(x.operands.rsplit(", ", 1)[-1], 0)
            op.busy = SUB_PARTITIONS * size / machine.l2_sums
        now = {}
        if op.kind in VECTOR:
            first = 0 if x.opcode.startswith(("ST", "SYNCS", "RED")) else 1
            for slot, operand in enumerate(x.operands.split(",")[first:]):
                for register, reuse in REGISTER.findall(operand):
                    op.reads += kept.get(slot) != register
                    if reuse:
                        now[slot] = register
        kept = now
        ops.append(op)
    return ops


def operand_bytes(x: Instruction) -> int:
    """Bytes of B, which an MMA reads from shared memory."""
    _, n, k = x.mma_shape
    return n * k * _element_bytes(x)


def loaded_bytes(x: Instruction) -> int:
    """Bytes of B that come from K or V."""
    return _columns(x) * x.mma_shape[2] * _element_bytes(x)


def _columns(x: Instruction) -> int:
    """Columns of scores or output: what P V has beyond a multiple of 16 are sums of P, by ones."""
    n = x.mma_shape[1]
    return n - n % 16 if registers_hold_a(x) else n


def a_bytes(x: Instruction) -> int:
    """Bytes of A that an MMA reads from shared memory."""
    m, _, k = x.mma_shape
    return 0 if registers_hold_a(x) else m * k * _element_bytes(x)


def starts_from_zero(x: Instruction) -> bool:
    """A matrix product that adds to nothing."""
    return "RZ, !UPT" in x.operands


def summed_bytes(x: Instruction) -> int:
    """Bytes that a warp's RED adds to global memory."""
    width = re.search(r"\.[FU]32x(\d)", x.opcode)
    return 4 * LANES * (int(width[1]) if width else 1)


def registers_hold_a(x: Instruction) -> bool:
    return "gdesc" not in x.operands.split(",")[1]


def _element_bytes(x: Instruction) -> int:
    return 2 if x.base == "HGMMA" else 1


def _kind(x: Instruction) -> str:
    if x.is_mma:
        return "mma"
    if x.opcode.startswith("WARPGROUP.DEPBAR"):
        return "depbar"
    if x.opcode == TAKEN:
        return "branch"
    return KIND_OF.get(x.base) or ("uniform" if x.base.startswith("U") else "alu")


def _decode_mma(op: Op, x: Instruction, machine: Machine) -> None:
    m, n, k = x.mma_shape
    smem = a_bytes(x) + operand_bytes(x)
    rate = machine.tensor_flops * 2 // _element_bytes(x) * machine.mma_eff
    op.flops = 2 * m * _columns(x) * k
    op.busy = max(2 * m * n * k / 4 / rate, smem / machine.smem_bytes)
    op.smem = smem / machine.smem_bytes / op.busy
    op.last = "gsb" in x.operands


def _decode_memory(op: Op, x: Instruction, machine: Machine) -> None:
    op.busy = machine.lsu
    if x.base == "SYNCS":
        op.latency = machine.lat_sync
        return
    words = 4 if ".128" in x.opcode or ".4" in x.opcode else 1
    if words == 1 and (".64" in x.opcode or ".2" in x.opcode):
        words = 2
    latencies = {"SHFL": machine.lat_shfl, "LDL": machine.lat_local, "STL": machine.lat_local}
    op.busy = machine.lsu * words
    op.latency = latencies.get(x.base, machine.lat_lds) + machine.lsu * (words - 1)
    op.smem = op.busy if x.base in SMEM else 0


def _barrier_kind(x: Instruction, consumers: int) -> str:
    """A barrier whose number is in a register goes round the consumers; one with an immediate
    number and all their threads is a meeting point; those with the producer are free."""
    number, threads = _barrier(x)
    ring = is_ring(x)
    if x.opcode.startswith("BAR.ARV"):
        return "pass" if ring else "control"
    if ring:
        return "turn"
    return "meet" if int(threads, 0) == consumers * 128 else "control"


def is_ring(x: Instruction) -> bool:
    """A named barrier of several warpgroups whose number is in a register."""
    number, threads = _barrier(x)
    count = int(threads, 0)
    return number.startswith("R") and count > 128 and count % 128 == 0


def _barrier(x: Instruction) -> list[str]:
    """Number and threads of a BAR."""
    return (x.operands.replace(" ", "").split(",") + ["0x0"])[:2]
