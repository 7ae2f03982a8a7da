"""Operand text -> operand tuples (see model.py)."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

_OFFSET = re.compile(r"^(.+?)\s*([+-])\s*(-?(?:0x[0-9a-fA-F]+|\d+))$")
_BITS32 = re.compile(r"^0[fF][0-9a-fA-F]{8}$")
_BITS64 = re.compile(r"^0[dD][0-9a-fA-F]{16}$")
_INTEGER = re.compile(r"^-?(0x[0-9a-fA-F]+|\d+)U?$")
_OCTAL = re.compile(r"^-?0\d+$")
_DECIMAL = re.compile(r"^-?\d+\.\d*([eE][-+]?\d+)?$")


def split(text: str) -> list[str]:
    """Split at top-level commas."""
    out, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        elif ch == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    if last := text[start:].strip():
        out.append(last)
    return out


def parse_operand(text: str, rename: Callable[[str], str]) -> tuple:
    """One operand; rename maps a name to its name in the current scope."""
    text = text.strip()
    if text.startswith("{"):
        return ("vec", [parse_operand(x, rename) for x in split(text[1:-1])])
    if text.startswith("["):
        return _address(split(text[1:-1]), rename)
    if text.startswith("!"):
        return ("not", parse_operand(text[1:], rename))
    if text == "_":
        return ("sink",)
    if "|" in text:
        a, b = text.split("|")
        return ("pair", parse_operand(a, rename), parse_operand(b, rename))
    return _number(text) or ("reg", rename(text))


def _address(inner: list[str], rename) -> tuple:
    if len(inner) == 2 and inner[1].startswith("{"):
        coords = [parse_operand(x, rename) for x in split(inner[1][1:-1])]
        return ("map", parse_operand(inner[0], rename), coords)
    base, offset = inner[0], 0
    if m := _OFFSET.match(base):
        base, offset = m.group(1), int(m.group(3), 0) * (1 if m.group(2) == "+" else -1)
    return ("mem", parse_operand(base, rename), offset)


def _number(text: str) -> tuple | None:
    if not (text[0].isdigit() or text[0] == "-"):
        return None
    if _BITS32.match(text):
        return ("f32", int(text[2:], 16))
    if _BITS64.match(text):
        return ("f64", int(text[2:], 16))
    if _INTEGER.match(text):
        text = text.rstrip("U")
        return ("imm", int(text, 8 if _OCTAL.match(text) and len(text) > 1 else 0))
    if _DECIMAL.match(text):
        return ("f32", struct.unpack("<I", struct.pack("<f", float(text)))[0])
    return None
