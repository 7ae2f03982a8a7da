"""What a parsed PTX module consists of.

Operands are tuples, by their first element:
    ("reg", name)           a register, special register, symbol or label; resolved when lowered
    ("imm", int)            ("f32", bits)           ("f64", bits)
    ("vec", [operands])     ("pair", a, b)          ("not", operand)        ("sink",)
    ("mem", operand, byte offset)                   ("map", operand, [coordinates])
    ("raw", text)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

REGISTER_CLASS = {
    "pred": "p",
    "b16": "h",
    "u16": "h",
    "s16": "h",
    "f16": "h",
    "b8": "h",
    "b32": "w",
    "u32": "w",
    "s32": "w",
    "f32": "w",
    "b64": "d",
    "u64": "d",
    "s64": "d",
    "f64": "d",
}
SIZE = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
}


class Location(NamedTuple):
    """A line of the kernel's Python source, from a .loc directive."""

    file: str
    line: int

    def __str__(self):
        return f"{self.file}:{self.line}"


class Param(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass
class Instr:
    op: str  # full opcode, e.g. "ld.shared.v4.b32"
    args: list  # operands
    pred: str | None = None  # guarding predicate register
    neg: bool = False  # guarded by its negation
    line: int = 0  # of the PTX text
    text: str = ""
    loc: Location | None = None
    parts: tuple[str, ...] = ()  # op.split(".")

    def __post_init__(self):
        self.parts = self.parts or tuple(self.op.split("."))


@dataclass
class Kernel:
    name: str
    params: list[Param] = field(default_factory=list)
    param_bytes: int = 0
    regs: dict[str, tuple[str, int]] = field(default_factory=dict)  # name -> (class, index)
    counts: dict[str, int] = field(default_factory=dict)  # class -> registers
    code: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> pc
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # symbol -> (offset, bytes)
    local: dict[str, int] = field(default_factory=dict)  # symbol -> offset, of a thread's memory
    local_bytes: int = 0
    constants: dict[str, np.ndarray] = field(default_factory=dict)  # initialised arrays of bytes
    allocations: list = field(default_factory=list)  # naming.Range: of the dynamic array
    static_smem: int = 0  # bytes; the dynamic array (0 bytes above) starts there
    directives: dict[str, list[int]] = field(default_factory=dict)
    lowered: dict = field(default_factory=dict)  # filled by lowering.lower()

    def declare(self, name: str, type_: str) -> None:
        """Give a register the next row of its class."""
        cls = REGISTER_CLASS[type_]
        index = self.counts.get(cls, 0)
        self.counts[cls] = index + 1
        self.regs[name] = (cls, index)

    def address(self, constant: str) -> int:
        """Where it lies in the memory of the host, and of the kernel."""
        return self.constants[constant].ctypes.data

    def reserve(self, name: str, alignment: int, nbytes: int) -> None:
        """Give a symbol a place in the local memory of each thread."""
        self.local[name] = -(-self.local_bytes // alignment) * alignment
        self.local_bytes = self.local[name] + nbytes


@dataclass
class Module:
    kernels: dict[str, Kernel]
    target: str
