"""PTX text -> Module.  Line numbers are those of the text; `.loc` gives lines of Python source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .. import naming
from ..errors import Unsupported
from .model import REGISTER_CLASS, SIZE, Instr, Kernel, Location, Module, Param
from .operands import parse_operand, split

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_SHARED_LINE = re.compile(r"^\s*(?:\.extern\s+|\.visible\s+)?\.shared[^;\n]*;", re.M)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
# local memory, and the parameters of calls, which are kept there
_LOCAL = re.compile(r"\.(?:local|param)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$")
_CONSTANT = re.compile(
    r"^\s*(?:\.visible\s+)?\.(?:global|const)\s[^;={]*\.[bus]8\s+([\w$]+)\[\d*\]\s*=\s*"
    r"\{([^}]*)\};",
    re.M,
)
_CALL = re.compile(r"(?:\(([^)]*)\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^)]*)\))?")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?!align)\w+\s+)*(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_DIRECTIVE = re.compile(
    r"\.(reqntid|maxntid|minnctapersm|maxnreg|reqnctapercluster|explicitcluster)\b([\s\d,]*)"
)
_GUARD = re.compile(r"^@(!?)([%\w$]+)\s+(.*)$")
_REG = re.compile(r"^\.reg\s+\.(\w+)\s+(.*)$")
_COUNTED = re.compile(r"^(%?[\w$]+)<(\d+)>$")
_NAME = re.compile(r"^[\w$%]+$")
# one alternative per thing that ends or interrupts a statement
_TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|\.loc\b[^\n]*|\.file\b[^\n]*|[{};]|(?<!:):(?!:)", re.S)
_ASM = re.compile(r"//\s*(begin|end) inline asm")
_IGNORED = (".pragma", ".branchtargets")


def parse(text: str) -> Module:
    target = (re.search(r"\.target\s+(\w+)", text) or [None, ""])[1]
    files = {int(number): path for number, path in _FILE.findall(text)}
    shared = dict(_shared(m.group(0)) for m in _SHARED_LINE.finditer(text))
    constants = {name: _array(numbers) for name, numbers in _CONSTANT.findall(text)}
    kernels, allocations = {}, naming.of_ptx(text)
    for m in _ENTRY.finditer(text):
        kernel = _entry(text, m, shared, files)
        kernel.constants = constants
        kernel.allocations = allocations.get(kernel.name, [])
        kernels[kernel.name] = kernel
    return Module(kernels, target)


def _entry(text: str, match: re.Match, shared: dict, files: dict) -> Kernel:
    kernel = Kernel(match.group(1))
    end = text.index(")", match.end())
    _params(kernel, text[match.end() : end])
    brace = text.index("{", end)
    for d in _DIRECTIVE.finditer(text, end, brace):
        kernel.directives[d.group(1)] = [int(x) for x in d.group(2).replace(",", " ").split()]
    symbols = dict(shared)
    _Body(kernel, symbols, files).read(text, brace + 1)
    offset = 0
    for name, (align, size) in sorted(symbols.items(), key=lambda x: x[1][1] == 0):
        offset = -(-offset // align) * align  # static symbols first, the dynamic array last
        kernel.shared[name] = (offset, size)
        offset += size
    kernel.static_smem = offset
    return kernel


def _params(kernel: Kernel, text: str) -> None:
    """Parameters packed as the launch expects them: each at the next multiple of its alignment."""
    offset = 0
    for declaration in split(text):
        m = _PARAM.match(" ".join(declaration.split()))
        if not m:
            raise Unsupported(f"parameter declaration {declaration!r}")
        size = SIZE[m.group(2)] * int(m.group(4) or 1)
        align = max(int(m.group(1) or 1), SIZE[m.group(2)])
        offset = -(-offset // align) * align
        kernel.params.append(Param(m.group(3), offset, size))
        offset += size
    kernel.param_bytes = offset


def _array(numbers: str) -> np.ndarray:
    """The initialiser of an array of bytes."""
    return np.array([int(number, 0) & 255 for number in split(numbers)], np.uint8)


def _shared(text: str) -> tuple[str, tuple[int, int]]:
    """(symbol, (alignment, bytes)) of a .shared declaration; 0 bytes for the dynamic array."""
    align, kind, name, count = _SHARED.search(text).groups()
    elements = 1 if count is None else int(count or 0)
    return name, (int(align or 1), SIZE[kind] * elements)


class _Statement(NamedTuple):
    kind: str  # "{", "}", "label", "loc", "comment" or "stmt"
    text: str
    line: int


def _statements(text: str, at: int) -> Iterator[_Statement]:
    """The statements of a body, from after its opening to before its closing brace."""
    line = text.count("\n", 0, at) + 1
    depth, pending, start = 1, "", line
    while True:
        token = _TOKEN.search(text, at)
        piece = text[at : token.start()]
        if not pending.strip():
            pending = piece.lstrip()
            start = line + piece[: len(piece) - len(pending)].count("\n")
        else:
            pending += piece
        line += text.count("\n", at, token.end())
        at, mark = token.end(), token.group()
        if mark[0] in "/.":
            yield _Statement("loc" if mark[0] == "." else "comment", mark, line)
        elif mark == ";":
            yield _Statement("stmt", " ".join(pending.split()), start)
            pending = ""
        elif mark == ":":
            if _NAME.match(pending.strip()):
                yield _Statement("label", pending.strip(), start)
                pending = ""
            else:
                pending += mark
        elif pending.strip():
            pending += mark  # a vector operand
        else:
            depth += 1 if mark == "{" else -1
            if depth == 0:
                return
            yield _Statement(mark, "", line)


class _Body:
    """Reads the statements of one kernel.  Braces scope registers and labels (inline asm)."""

    def __init__(self, kernel: Kernel, symbols: dict, files: dict):
        self.kernel, self.symbols, self.files = kernel, symbols, files
        self.scopes: list[dict[str, str]] = [{}]
        self.serials = [0]
        self.loc: Location | None = None
        self.in_asm = False

    def rename(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def read(self, text: str, at: int) -> None:
        statements = list(_statements(text, at))
        local, serial = _local_labels(statements), 0
        for kind, text_, line in statements:
            if kind == "loc":
                self._locate(text_)
            elif kind == "comment":
                if m := _ASM.match(text_):
                    self.in_asm = m.group(1) == "begin"
            elif kind == "{":
                serial += 1
                self.scopes.append(dict(local.get(serial, {})))
                self.serials.append(serial)
            elif kind == "}":
                self.scopes.pop()
                self.serials.pop()
            elif kind == "label":
                self.kernel.labels[self.rename(text_)] = len(self.kernel.code)
            elif text_.startswith("."):
                self._declare(text_, line)
            elif text_:
                self.kernel.code.append(self._instruction(text_, line))

    def _locate(self, text: str) -> None:
        """Inside inline asm, compilers add the line in the asm text to the line of the asm."""
        if self.in_asm:
            return
        if m := _LOC.match(text):
            number, line = int(m.group(1)), int(m.group(2))
            self.loc = Location(self.files.get(number, f"file {number}"), line)

    def _declare(self, text: str, line: int) -> None:
        if m := _REG.match(text):
            if m.group(1) not in REGISTER_CLASS:
                raise Unsupported(f"PTX line {line}: register type in {text}")
            self._registers(m.group(1), m.group(2))
        elif _SHARED.search(text):
            name, place = _shared(text)
            self.symbols[name] = place
        elif m := _LOCAL.match(text):
            alignment, kind, name, count = m.groups()
            unique = f"{name}@{self.serials[-1]}" if self.serials[-1] else name
            self.scopes[-1][name] = unique
            size = SIZE[kind]
            self.kernel.reserve(unique, max(int(alignment or 1), size), size * int(count or 1))
        elif not text.startswith(_IGNORED):
            raise Unsupported(f"PTX line {line}: directive {text}")

    def _registers(self, kind: str, names: str) -> None:
        suffix = f"@{self.serials[-1]}" if self.serials[-1] else ""
        for item in names.split(","):
            item = item.strip()
            counted = _COUNTED.match(item)
            for name in (
                [f"{counted.group(1)}{i}" for i in range(int(counted.group(2)))]
                if counted
                else [item]
            ):
                self.scopes[-1][name] = name + suffix
                self.kernel.declare(name + suffix, kind)

    def _instruction(self, text: str, line: int) -> Instr:
        pred, neg, body = None, False, text
        if m := _GUARD.match(text):
            neg, pred, body = bool(m.group(1)), self.rename(m.group(2)), m.group(3)
        op, _, rest = body.partition(" ")
        if op.startswith("call"):
            args = self._call(rest)
        else:
            args = [parse_operand(x, self.rename) for x in split(rest)]
        return Instr(op, args, pred, neg, line, text, self.loc)

    def _call(self, text: str) -> list[tuple]:
        """[the name of the function, its parameters, its results]"""
        results, name, parameters = _CALL.match(text).groups()
        both = (
            [parse_operand(x, self.rename) for x in split(t or "")] for t in (parameters, results)
        )
        return [("raw", name), *(("vec", operands) for operands in both)]


def _local_labels(statements: list[_Statement]) -> dict[int, dict[str, str]]:
    """Labels inside nested braces, by the serial number of their brace: name -> unique name."""
    local: dict[int, dict[str, str]] = {}
    stack, serial = [0], 0
    for kind, text, _ in statements:
        if kind == "{":
            serial += 1
            stack.append(serial)
        elif kind == "}":
            stack.pop()
        elif kind == "label" and stack[-1]:
            local.setdefault(stack[-1], {})[text] = f"{text}@{stack[-1]}"
    return local
