"""Names of what lies in shared memory: the variables that a kernel's source assigns it to.

While a kernel is traced, dsl.py tells of each allocation. When it is compiled, their places are
added to its PTX as comments, so that whoever keeps the PTX keeps them; the code is what it was.
The DSL lays them one after another, each at the next multiple of its alignment.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from .source import assigned_at

_COMMENT = "// shared memory of {kernel}: {start}..{end} {name}\n"
_FOUND = re.compile(r"^// shared memory of (\S+): (\d+)\.\.(\d+) (.*)$", re.M)
_ADDRESS = re.compile(
    r"\b(?:shared memory|mbarrier|shared access|shared address)(?: at)? "
    r"0x([0-9a-f]+)(?:\.\.0x([0-9a-f]+))?"
)
_MOST = 3  # names of a range


class Range(NamedTuple):
    start: int  # bytes from the start of dynamic shared memory
    end: int
    name: str


class _Allocation(NamedTuple):
    nbytes: int
    alignment: int
    statements: tuple  # that it is assigned in, innermost first: (file, line, names)
    fields: tuple[tuple[str, int, int], ...]  # of a struct: name, bytes, offset


class Allocations:
    """Those of the kernels that are being traced."""

    def __init__(self):
        self._of: dict[str, list[_Allocation]] = {}

    def add(self, kernel: str, nbytes: int, alignment: int, frames, fields) -> None:
        """frames: (file, line) of the callers outside of the DSL, innermost first."""
        found = _Allocation(nbytes, alignment, _statements(frames), tuple(fields or ()))
        self._of.setdefault(kernel, []).append(found)

    def comments(self, ptx: str) -> str:
        """What to add to the PTX of kernels that were traced; they are forgotten."""
        text = ""
        for kernel in re.findall(r"\.entry\s+([\w$]+)", ptx):
            for start, end, name in _ranges(self._of.pop(kernel, [])):
                text += _COMMENT.format(kernel=kernel, start=start, end=end, name=name)
        return text


def _statements(frames) -> tuple:
    """The innermost assignment, and the next one if it names one variable: `q = ring(...)`."""
    found = []
    for file, line in frames:
        statement = assigned_at(file, line)
        if statement and (file, *statement) not in found:
            found.append((file, *statement))
        if len(found) == 2:
            break
    return tuple(found)


def _ranges(allocations: list[_Allocation]) -> list[Range]:
    made = Counter(statement for a in allocations for statement in a.statements)
    seen, at, found = Counter(), 0, []
    for allocation in allocations:
        start = -(-at // allocation.alignment) * allocation.alignment
        at = start + allocation.nbytes
        words = []
        for statement in allocation.statements:
            names, index = statement[2], seen[statement]
            seen[statement] += 1
            if len(names) == made[statement]:  # as many variables as allocations, in order
                names = (names[index],)
            words.append(", ".join(names) if len(names) == 1 or not words else "")
        name = ".".join(filter(None, reversed(words)))
        fields = allocation.fields or (("", allocation.nbytes, 0),)
        for field, nbytes, offset in fields:
            called = ".".join(filter(None, (name, field)))
            found.append(Range(start + offset, start + offset + nbytes, called))
    return found


def of_ptx(ptx: str) -> dict[str, list[Range]]:
    """By kernel."""
    found: dict[str, list[Range]] = {}
    for kernel, start, end, name in _FOUND.findall(ptx):
        found.setdefault(kernel, []).append(Range(int(start), int(end), name))
    return found


def named(text: str, kernel, dynamic_smem: int) -> str:
    """A message with the names of the places in shared memory that it speaks of."""
    ranges = kernel.allocations
    if not ranges or max(x.end for x in ranges) > dynamic_smem:  # not laid out as expected
        return text

    def name(match: re.Match) -> str:
        low, high = (int(x, 16) - kernel.static_smem for x in (match[1], match[2] or match[1]))
        names = [x.name for x in ranges if x.name and x.start <= high and low < x.end]
        names = names[:_MOST] + ["..."] * (len(names) > _MOST)
        return f"{match[0]} ({', '.join(names)})" if names else match[0]

    return _ADDRESS.sub(name, text)
