"""SASS: a cubin disassembled by nvdisasm, as instructions with their scheduling control."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGE = "nvidia-cuda-nvdisasm"

LABEL = re.compile(r"(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
KERNEL = re.compile(r"\.text\.(\S+):")
INSTRUCTION = re.compile(
    r"""\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+
        (?P<predicate>@!?U?P\w+)?\s*(?P<opcode>[A-Z]\S*)\s*(?P<operands>.*?)\s*
        (?:\(\*"(?P<note>.*?)"\*\)\s*)?;
        (?:\s+/\*\ 0x[0-9a-f]{16}\ \*/)?\s*$""",
    re.VERBOSE,
)
SECOND_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
CONTROL_SHIFT = 41  # the control bits are 105 to 125 of the 128-bit instruction
NO_BARRIER = 7


class DisassemblerMissing(RuntimeError):
    """nvdisasm is not on this machine."""


@dataclass(frozen=True)
class Control:
    """What the compiler tells the scheduler. Barriers are scoreboards 0 to 5, 7 is none."""

    stall: int = 1  # cycles until this warp's next issue
    write_barrier: int = NO_BARRIER  # released when the result is written
    read_barrier: int = NO_BARRIER  # released when the operands are read
    wait: int = 0  # mask of scoreboards that must be free before issue

    @classmethod
    def decode(cls, word: int) -> "Control":
        """From the upper 64 bits of an instruction."""
        bits = word >> CONTROL_SHIFT
        return cls(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


@dataclass(frozen=True)
class Instruction:
    address: int  # bytes from the kernel's start
    predicate: str  # "@P0", "@!UP1" or ""
    opcode: str  # with its modifiers: "HGMMA.64x128x16.F32.BF16"
    operands: str
    control: Control = Control()
    note: str = ""  # ptxas's remark: "SpillRefill" on the local memory of spilled registers

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.predicate, self.opcode, self.operands) if part)

    @property
    def is_mma(self) -> bool:
        """A matrix product, of a warpgroup or of a warp."""
        return self.is_wgmma or self.base in ("HMMA", "QMMA", "IMMA")

    @property
    def is_wgmma(self) -> bool:
        """A warpgroup matrix product: 16-bit, 8-bit float or 8-bit integer."""
        return self.base in ("HGMMA", "QGMMA", "IGMMA")

    @property
    def is_exp2(self) -> bool:
        return self.opcode.startswith("MUFU.EX2")

    @property
    def mma_shape(self) -> tuple[int, int, int]:
        """(m, n, k) of a matrix product."""
        if self.is_wgmma:
            m, n, k = re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode).groups()
        else:  # HMMA.16816: one digit of n
            m, n, k = re.search(r"\.(\d\d)(\d)(\d+)", self.opcode).groups()
        return int(m), int(n), int(k)

    @property
    def label(self) -> str | None:
        """The label this instruction names: of a branch its target, of BSSY where threads meet."""
        match = TARGET.search(self.operands)
        return match and match[1]

    @property
    def is_spill(self) -> bool:
        """A load or store of local memory that ptxas made for want of registers."""
        return self.note == "SpillRefill"

    @property
    def bytes(self) -> int:
        """Bytes per thread of a load or store."""
        width = re.search(r"\.(8|16|32|64|128)\b|\.[US](8|16)\b", self.opcode)
        return int(width[1] or width[2]) // 8 if width else 4

    @property
    def is_branch(self) -> bool:
        return self.base in ("BRA", "BRX", "JMP", "JMX")


@dataclass(frozen=True)
class Program:
    """One kernel's instructions; positions in `code` are what the other modules speak in."""

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> position

    def target(self, position: int) -> int | None:
        """Where the branch at `position` goes; None for other instructions and unknown targets."""
        instruction = self.code[position]
        return self.labels.get(instruction.label) if instruction.is_branch else None

    @cached_property
    def text(self) -> str:
        """A listing for people: address, control bits, instruction."""
        names: dict[int, list[str]] = {}
        for label, position in self.labels.items():
            names.setdefault(position, []).append(label)
        lines = [f"{self.name}:"]
        for position, x in enumerate(self.code):
            lines += [f"{label}:" for label in names.get(position, ())]
            c = x.control
            scoreboards = "".join("-" if b == NO_BARRIER else str(b) for b in
                                  (c.write_barrier, c.read_barrier))  # fmt: skip
            lines.append(f"  /*{x.address:04x}*/ {c.stall:2} {scoreboards} {c.wait:06b}  {x.text}")
        return "\n".join(lines) + "\n"


def nvdisasm() -> Path:
    """The disassembler: $NVDISASM, the one of the PyPI package, or the one on PATH."""
    named = os.environ.get("NVDISASM")
    if named:
        if not os.access(named, os.X_OK):
            raise DisassemblerMissing(f"NVDISASM={named} is no executable file")
        return Path(named)
    try:
        for file in files(PACKAGE) or ():
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return Path(file.locate())
    except PackageNotFoundError:
        pass
    found = shutil.which("nvdisasm")
    if found:
        return Path(found)
    raise DisassemblerMissing(
        f"nvdisasm not found: pip install 'fa3[inspect]' (package {PACKAGE}), "
        "or name it in the environment variable NVDISASM"
    )


def disassemble(cubin: bytes) -> str:
    """nvdisasm's text of a cubin, with the instruction words. Raises ValueError when it refuses."""
    with tempfile.TemporaryDirectory(prefix="fa3-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([nvdisasm(), "-hex", path], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nvdisasm failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def parse(text: str) -> tuple[Program, ...]:
    """The kernels in nvdisasm's text; control bits only where it was made with -hex."""
    programs: list[Program] = []
    code: list[Instruction] = []
    labels: dict[str, int] = {}

    def close(name: str | None):
        if name and code:
            programs.append(Program(name, tuple(code), dict(labels)))
        code.clear()
        labels.clear()

    name = None
    for line in text.splitlines():
        if match := KERNEL.match(line):
            close(name)
            name = match[1]
        elif line.startswith("\t.section"):
            close(name)
            name = None
        elif name is None:
            continue
        elif match := LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := INSTRUCTION.match(line):
            fields = {key: value or "" for key, value in match.groupdict().items()}
            code.append(Instruction(**fields | {"address": int(fields["address"], 16)}))
        elif code and (match := SECOND_WORD.match(line)):
            code[-1] = replace(code[-1], control=Control.decode(int(match[1], 16)))
    close(name)
    return tuple(programs)


def load(cubin: bytes) -> tuple[Program, ...]:
    """The kernels of a cubin."""
    return parse(disassemble(cubin))
