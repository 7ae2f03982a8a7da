"""mov (with packing and unpacking), cvt, cvta, isspacep."""

from __future__ import annotations

from ..errors import Unsupported
from ..memory.generic import GLOBAL, LOCAL, SHARED, WINDOW_SHIFT
from .emitter import DTYPE, KIND, instr_type
from .registry import lowers

_SIZE = {"b16": 2, "b32": 4, "b64": 8}
_UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}


@lowers("mov")
def mov(e, i):
    t = instr_type(i)
    d, s = i.args
    if s[0] == "vec":
        return _pack(e, d, s[1], _SIZE[t])
    if d[0] == "vec":
        return _unpack(e, d[1], s, _SIZE[t])
    if t == "pred":
        return e.put(e.dst(d, "u32"), e.pred(s))
    e.put(e.dst(d, t), e.src(s, t))


def _pack(e, d, parts, size: int):
    part = size // len(parts)
    if part not in _UNSIGNED:
        raise Unsupported("pack")
    shifted = (
        f"({e.src(x, _UNSIGNED[part])}.astype(u{size})<<u{size}({8 * part * j}))"
        for j, x in enumerate(parts)
    )
    e.put(e.dst(d, _UNSIGNED[size]), "|".join(shifted))


def _unpack(e, parts, s, size: int):
    part = size // len(parts)
    e.line(f"t={e.src(s, _UNSIGNED[size])}")
    for j, x in enumerate(parts):
        e.put(e.dst(x, _UNSIGNED[part]), f"(t>>u{size}({8 * part * j})).astype(u{part})")


@lowers("cvta")
def cvta(e, i):
    t = instr_type(i)
    x, to = e.src(i.args[1], t), i.parts[1] == "to"
    if "shared" in i.parts[2 if to else 1]:
        window = SHARED << WINDOW_SHIFT
        x = f"{x}&u8({window - 1})" if to else f"{x}|u8({window})"
    e.put(e.dst(i.args[0], t), x)  # addresses of other spaces are generic already


@lowers("isspacep")
def isspacep(e, i):
    space = {"global": GLOBAL, "shared": SHARED, "local": LOCAL}[i.parts[1].split("::")[0]]
    e.put(e.dst(i.args[0], "u32"), f"({e.src(i.args[1], 'u64')}>>u8({WINDOW_SHIFT}))=={space}")


@lowers("cvt")
def cvt(e, i):
    dt, st = [x for x in i.parts[1:] if x in DTYPE]
    mods = tuple(x for x in i.parts[1:] if x not in DTYPE)
    d = e.dst(i.args[0], dt)
    if len(i.args) == 3:
        hi, lo = e.src(i.args[1], "f32"), e.src(i.args[2], "f32")
        return e.put(d, f"convert.pack('{dt}',{mods},{hi},{lo},w.lanes)")
    s = e.src(i.args[1], st)
    if st.endswith("x2") and dt.endswith("x2"):
        return e.put(d, f"convert.repack('{dt}','{st}',{mods},{s})")
    if "f" not in (KIND[dt], KIND[st]) and "bf16" not in (dt, st) and "sat" not in mods:
        return e.put(d, f"{s}.astype({DTYPE[dt]})")
    if st == dt == "f32" and not mods:
        return e.put(d, s)
    e.put(d, f"convert.scalar('{dt}','{st}',{mods},{s})")
