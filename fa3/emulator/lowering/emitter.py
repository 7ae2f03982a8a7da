"""Source text for operands and results.

Rows are named by register class and index, as in Warpgroup: U[3], F[7], P[0].  In a masked
segment results are written where `m` holds; a guarded instruction has its own mask `m1`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..errors import Unsupported
from ..memory.generic import LOCAL, PARAMETERS, WINDOW_SHIFT
from ..numerics import convert, halves, integers
from ..numerics.formats import flush, flushed, flushing, fma, inverse_sqrt
from ..ptx import Instr, Kernel

BANK = {
    ("w", "u"): "U",
    ("w", "s"): "S",
    ("w", "f"): "F",
    ("d", "u"): "D",
    ("d", "s"): "Q",
    ("d", "f"): "E",
    ("h", "u"): "H",
    ("h", "s"): "J",
    ("h", "f"): "G",
}
WIDTH = {"w": 4, "d": 8, "h": 2}
# PTX type -> numpy dtype, by the short name that generated code knows
DTYPE = {
    "u8": "u1",
    "s8": "i1",
    "b8": "u1",
    "u16": "u2",
    "s16": "i2",
    "b16": "u2",
    "f16": "f2",
    "bf16": "u2",
    "u32": "u4",
    "s32": "i4",
    "b32": "u4",
    "f32": "f4",
    "u16x2": "u4",
    "s16x2": "u4",
    "f16x2": "u4",
    "bf16x2": "u4",
    "tf32": "f4",
    "u64": "u8",
    "s64": "i8",
    "b64": "u8",
    "f64": "f8",
    "e4m3x2": "u2",
    "e5m2x2": "u2",
}
KIND = {t: {"f": "f", "i": "s"}.get(d[0], "u") for t, d in DTYPE.items()}
_UFUNCS = """add subtract multiply less less_equal greater greater_equal equal not_equal bitwise_and
    bitwise_or bitwise_xor invert left_shift right_shift logical_and logical_or logical_not
    logical_xor minimum maximum fmin fmax negative absolute where copyto exp2 log2 sqrt tanh sin
    cos isnan copysign divide reciprocal bitwise_count""".split()
_CLOCKS = ("%clock", "%clock64", "%globaltimer", "%globaltimer_lo", "%clock_hi")


def itemsize(ptx_type: str) -> int:
    return np.dtype(DTYPE[ptx_type]).itemsize


class Emitter:
    def __init__(self, kernel: Kernel, instead: Mapping[Callable, Callable]):
        """instead: what generated code calls in place of some functions."""
        self.kernel, self._instead = kernel, instead
        self.names = {n: getattr(np, n) for n in _UFUNCS}
        self.names.update(np=np, convert=convert, halves=halves, integers=integers)
        self.names.update(flush=flush, flushed=flushed, flushing=flushing)
        self.names.update(fma=fma, inverse_sqrt=inverse_sqrt)
        self.names.update(
            {
                t: np.dtype(t).type
                for t in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
            }
        )
        self._constants: dict[tuple, str] = {}
        self._functions: dict[object, str] = {}
        self.lines: list[str] = []
        self.mask: str | None = None  # name of the mask of the current instruction
        self.pc = 0

    def begin(self, pc: int, mask: str | None) -> None:
        self.lines, self.pc, self.mask = [], pc, mask

    # operands

    def register(self, name: str) -> tuple[str, int] | None:
        return self.kernel.regs.get(name)

    def index(self, operand) -> int:
        """Number of a register in its class."""
        return self.register(operand[1])[1]

    def constant(self, value, dtype: str) -> str:
        """A row of one element: it broadcasts and keeps numpy from guessing types."""
        d = np.dtype(dtype)
        if d.kind in "ui":
            value &= (1 << 8 * d.itemsize) - 1
        key = (value, dtype)
        if key not in self._constants:
            name = f"k{len(self._constants)}"
            unsigned = d.kind in "ui"
            self.names[name] = (
                np.array([value], f"u{d.itemsize}").view(d) if unsigned else np.array([value], d)
            )
            self._constants[key] = name
        return self._constants[key]

    def _bits(self, bits: int, unsigned: str, dtype: str) -> str:
        key = (bits, dtype, "bits")
        if key not in self._constants:
            name = self._constants[key] = f"k{len(self._constants)}"
            self.names[name] = np.array([bits], unsigned).view(dtype)
        return self._constants[key]

    def bind(self, thing) -> str:
        """The name by which generated code refers to a function or object."""
        if callable(thing):
            thing = self._instead.get(thing, thing)
        key = thing if callable(thing) else id(thing)
        if key not in self._functions:
            stem = getattr(thing, "__name__", "o")
            name = self._functions[key] = f"{stem}_{len(self._functions)}"
            self.names[name] = thing
        return self._functions[key]

    def src(self, operand, t: str) -> str:
        """An operand read as PTX type t."""
        kind = operand[0]
        if kind == "reg":
            return self._read(operand[1], t)
        if kind == "imm":
            is_float = KIND[t] == "f"
            return self.constant(float(operand[1]) if is_float else operand[1], DTYPE[t])
        if kind == "f32":
            return (
                self._bits(operand[1], "u4", "f4")
                if DTYPE[t] == "f4"
                else self.constant(operand[1], DTYPE[t])
            )
        if kind == "f64":
            return (
                self._bits(operand[1], "u8", "f8")
                if KIND[t] == "f"
                else self.constant(operand[1], "u8")
            )
        if kind == "not":
            return f"~{self.src(operand[1], t)}"
        raise Unsupported(f"operand {operand}")

    def _read(self, name: str, t: str) -> str:
        r = self.register(name)
        if r is None:
            return self._special(name, t) if name.startswith("%") else self.symbol(name, t)
        if r[0] == "p":
            return f"P[{r[1]}]"
        row = f"{BANK[r[0], KIND[t]]}[{r[1]}]"
        need = itemsize(t)
        if need < WIDTH[r[0]] and KIND[t] != "f":  # narrow read of a wide register
            return f"{row}.astype({DTYPE[t]})"
        if need != WIDTH[r[0]]:
            raise Unsupported(f"register {name} of {WIDTH[r[0]]} bytes read as {t}")
        return row

    def _special(self, name: str, t: str) -> str:
        if name in _CLOCKS:
            return f"w.clock({DTYPE[t]})"
        text = f"w.sp['{name}']"
        return text if itemsize(t) == 4 else f"{text}.astype({DTYPE[t]})"

    def symbol(self, name: str, t: str) -> str:
        """The address of a symbol or kernel parameter."""
        if name == "WARP_SZ":
            return self.constant(32, DTYPE[t])
        if name in self.kernel.shared:
            return self.constant(self.kernel.shared[name][0], DTYPE[t])
        if p := self.parameter(name):
            return self.constant(PARAMETERS << WINDOW_SHIFT | p.offset, "u8")
        if name in self.kernel.local:
            return self.constant(LOCAL << WINDOW_SHIFT | self.kernel.local[name], "u8")
        if name in self.kernel.constants:
            return self.constant(self.kernel.address(name), "u8")
        raise Unsupported(f"symbol {name}")

    def parameter(self, name: str):
        return next((p for p in self.kernel.params if p.name == name), None)

    def pred(self, operand) -> str:
        if operand[0] == "imm":
            return self.constant(bool(operand[1]), "?")
        if operand[0] == "not":
            return f"~{self.pred(operand[1])}"
        return self.src(operand, "u32")

    def dst(self, operand, t: str) -> str | None:
        """The row to write; a register wider than t is written extended.  None for a sink."""
        if operand[0] == "sink":
            return None
        r = self.register(operand[1])
        if r is None:
            raise Unsupported(f"destination {operand}")
        return f"P[{r[1]}]" if r[0] == "p" else f"{BANK[r[0], KIND[t]]}[{r[1]}]"

    def address(self, operand, space: str) -> str:
        """ "row,offset" of a memory operand in space "shared" or another."""
        if operand[0] != "mem":
            raise Unsupported(f"address {operand}")
        _, base, offset = operand
        if base[0] == "reg":
            r = self.register(base[1])
            if r:
                return f"{'U' if r[0] == 'w' else 'D'}[{r[1]}],{offset}"
            kind = "u32" if base[1] in self.kernel.shared else "u64"
            return f"{self.symbol(base[1], kind)},{offset}"
        return f"{self.constant(base[1], 'u4' if space == 'shared' else 'u8')},{offset}"

    def rows(self, texts: list[str | None]) -> str:
        return "[" + ",".join(t or "None" for t in texts) + "]"

    # emission

    def line(self, text: str) -> None:
        self.lines.append(text)

    def ufunc(self, f: str, dst: str, *sources: str) -> None:
        where = f",where={self.mask}" if self.mask else ""
        self.line(f"{f}({','.join(sources)},out={dst}{where})")

    def put(self, dst: str | None, value: str) -> None:
        if dst is None:
            return
        if self.mask:
            self.line(f"copyto({dst},{value},where={self.mask},casting='unsafe')")
        else:
            self.line(f"{dst}[:]={value}")

    def call(self, f, *arguments) -> None:
        """f(w, mask, *arguments)"""
        self.line(f"{self.bind(f)}({','.join(['w', str(self.mask), *map(str, arguments)])})")


def vector(operand) -> list:
    """The elements of a vector operand."""
    return operand[1] if operand[0] == "vec" else [operand]


def pair(operand) -> tuple:
    """(first, second or None) of a destination a|b."""
    return (operand[1], operand[2]) if operand[0] == "pair" else (operand, None)


def instr_type(instr: Instr) -> str:
    return instr.parts[-1]
