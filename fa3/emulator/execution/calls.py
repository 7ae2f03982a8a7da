"""The functions that a kernel may call: vprintf and __assertfail, with parameters in local memory.

Both get pointers to strings in global memory, vprintf one to its arguments in local memory, where
each lies as in C.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import numpy as np

from ..errors import KernelError, OutOfBounds
from ..watching import watched

_SPECIFIER = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d*))?"
    r"(?P<length>hh|h|ll|l|j|z|t)?(?P<kind>[diouxXcsfFeEgGaAp%])"
)
_OFFSET = 0xFFFFFFFF  # of a local address


class _Arguments:
    """The arguments of one thread, one after the other."""

    def __init__(self, memory: np.ndarray, at: int):
        self._memory, self._at = memory, at
        self.count = 0

    def next(self, dtype: str):
        size = np.dtype(dtype).itemsize
        at = -(-self._at // size) * size
        self._at = at + size
        self.count += 1
        if at + size > len(self._memory):
            raise OutOfBounds(f"printf reads its argument {self.count} outside of local memory")
        return self._memory[at : at + size].view(dtype)[0].item()


def _string(w, address: int) -> str:
    """The characters in global memory up to a zero."""
    region = w.memory.find(address, address + 1, "read of a string")
    found = region.bytes[address - region.start :].tobytes()
    return found.partition(b"\0")[0].decode(errors="replace")


def _formatted(w, text: str, arguments: _Arguments) -> Iterator[str]:
    """What C's printf makes of a format, in parts."""
    end = 0
    for match in _SPECIFIER.finditer(text):
        yield text[end : match.start()]
        end = match.end()
        yield _one(w, match, arguments)
    yield text[end:]


def _one(w, match: re.Match, arguments: _Arguments) -> str:
    kind, length = match["kind"], match["length"] or ""
    if kind == "%":
        return "%"
    flags, width, precision = match["flags"], match["width"] or "", match["precision"]
    width = str(arguments.next("i4")) if width == "*" else width
    precision = str(arguments.next("i4")) if precision == "*" else precision
    how = f"%{flags}{width}" + ("" if precision is None else f".{precision}")
    if kind == "s":
        return f"{how}s" % _string(w, arguments.next("u8"))
    if kind == "p":
        return f"%{flags}{width}s" % f"{arguments.next('u8'):#x}"
    if kind == "c":
        return f"%{flags}{width}s" % chr(arguments.next("i4") & 255)
    if kind in "aA":
        value = arguments.next("f8").hex()
        return f"%{flags}{width}s" % (value.upper() if kind == "A" else value)
    if kind in "fFeEgG":
        return f"{how}{kind}" % arguments.next("f8")
    return _integer(
        how, kind, arguments.next("i8" if length in ("l", "ll", "j", "z", "t") else "i4"), length
    )


def _integer(how: str, kind: str, value: int, length: str) -> str:
    bits = {"": 32, "h": 16, "hh": 8}.get(length, 64)
    value &= (1 << bits) - 1
    if kind in "di" and value >> bits - 1:
        value -= 1 << bits
    text = f"{how}{'d' if kind in 'diu' else kind}" % value
    return text.replace("0o", "0", 1) if kind == "o" else text


def _vprintf(w, mask, parameters, results) -> None:
    """Prints at once, thread by thread, to sys.stdout, but what is watched."""
    where, first = parameters
    parts = []
    for lane in np.flatnonzero(mask):
        memory = w.local[lane]
        text, at = (int(memory[p : p + 8].view(np.uint64)[0]) for p in (where, first))
        arguments = _Arguments(memory, at & _OFFSET)
        printed = "".join(_formatted(w, _string(w, text), arguments))
        if not watched.takes(w.cta.position, w.first_thread + int(lane), printed):
            parts.append(printed)
        for result in results:
            memory[result : result + 4].view(np.int32)[0] = arguments.count
    sys.stdout.write("".join(parts))


def _assertfail(w, mask, parameters, results) -> None:
    memory = w.local[int(np.flatnonzero(mask)[0])]
    message, file, function = (
        _string(w, int(memory[p : p + 8].view(np.uint64)[0]))
        for p in (*parameters[:2], parameters[3])
    )
    line = int(memory[parameters[2] : parameters[2] + 4].view(np.uint32)[0])
    raise KernelError(f"assertion failed: {message} ({file}:{line} in {function})")


FUNCTIONS = {"vprintf": _vprintf, "__assertfail": _assertfail}
