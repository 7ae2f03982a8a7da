"""ld, st, atom, red, shared-memory addresses of a cluster, cp.async of Ampere."""

from __future__ import annotations

from ..errors import Unsupported
from ..memory import atomics, bulk, cp_async, generic, shared
from ..memory.shared import OFFSET, RANK_SHIFT
from .emitter import DTYPE, instr_type, itemsize, vector
from .registry import lowers

_STRONG = {"acquire", "release", "relaxed", "volatile", "mmio"}
_ATOMIC = {"add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas"}


def _space(i) -> str:
    """ "shared", "param" or "generic" (which global and local are parts of)"""
    for part in i.parts:
        if part.startswith(("shared", "param")):
            return part[:6] if part[0] == "s" else "param"
        if part == "const":
            raise Unsupported("const memory")
    return "generic"


def communicates(i) -> bool:
    """Whether CTAs may tell each other something by it: atomics, and what counts as one."""
    kind, shared = i.parts[0], any(part.startswith("shared") for part in i.parts)
    if kind == "cp":
        return "reduce" in i.parts
    return (kind in ("atom", "red") or kind in ("ld", "st") and _is_strong(i)) and not shared


def _is_strong(i) -> bool:
    return not _STRONG.isdisjoint(i.parts)


def _strong(i) -> generic.Strong:
    """Of a load or a store, or of an atomic, which is .relaxed by default."""
    if i.parts[0] in ("ld", "ldu", "st") and not _is_strong(i):
        return None
    if not {"cta", "cluster"}.isdisjoint(i.parts):
        return False, False
    both = "acq_rel" in i.parts
    return both or "acquire" in i.parts, both or "release" in i.parts


@lowers("ld", "ldu")
def ld(e, i):
    t, space = instr_type(i), _space(i)
    rows = [e.dst(x, t) for x in vector(i.args[0])]
    if space == "param":
        _, base, offset = i.args[1]
        if p := e.parameter(base[1]):
            es = itemsize(t)
            for j, d in enumerate(rows):
                at = p.offset + offset + j * es
                e.put(d, f"w.params[{at}:{at + es}].view({DTYPE[t]})")
            return
    f, strong = (shared.load, []) if space == "shared" else (generic.load, [_strong(i)])
    e.call(f, DTYPE[t], e.rows(rows), e.address(i.args[1], space), *strong)


@lowers("st")
def st(e, i):
    t, space = instr_type(i), _space(i)
    address, rows = e.address(i.args[0], space), e.rows([e.src(x, t) for x in vector(i.args[1])])
    if i.parts[1] == "async":
        return e.call(bulk.store_async, DTYPE[t], rows, address, e.address(i.args[2], "shared"))
    f, strong = (shared.store, []) if space == "shared" else (generic.store, [_strong(i)])
    e.call(f, DTYPE[t], rows, address, *strong)


@lowers("atom", "red")
def atomic(e, i):
    if "async" in i.parts:
        raise Unsupported("red.async")
    t = instr_type(i)
    space = "shared" if _space(i) == "shared" else "global"
    op = next(x for x in i.parts[1:] if x in _ATOMIC)
    if t in atomics.HALF and op != "add":
        raise Unsupported(f"{op} of {t}")
    olds, args = (vector(i.args[0]), i.args[1:]) if i.parts[0] == "atom" else (None, i.args)
    how = f"('{space}','{op}','{t}',{DTYPE[t]},{_strong(i)})"
    base, start = e.address(args[0], space).rsplit(",", 1)
    for j, x in enumerate(vector(args[1])):
        row = e.dst(olds[j], t) if olds else None
        c = e.src(args[2], t) if op == "cas" else None
        e.call(atomics.atomic, how, row, base, int(start) + j * itemsize(t), e.src(x, t), c)


@lowers("mapa")
def mapa(e, i):
    if instr_type(i) != "u32" or "shared::cluster" not in i.parts:
        raise Unsupported("mapa of generic addresses")
    x, rank = e.src(i.args[1], "u32"), e.src(i.args[2], "u32")
    e.put(e.dst(i.args[0], "u32"), f"({x}&u4({OFFSET}))|(({rank}+u4(1))<<u4({RANK_SHIFT}))")


@lowers("getctarank")
def getctarank(e, i):
    x = e.src(i.args[1], "u32")
    e.put(
        e.dst(i.args[0], "u32"),
        f"where({x}>>u4({RANK_SHIFT}),({x}>>u4({RANK_SHIFT}))-u4(1),u4(w.cta.rank))",
    )


def cp_async_ampere(e, i):
    """cp.async{.ca,.cg}, its groups and its arrival on mbarriers."""
    q = i.parts
    if "commit_group" in q:
        return e.call(cp_async.commit)
    if "wait_group" in q or "wait_all" in q:
        return e.call(cp_async.wait, i.args[0][1] if i.args else None)
    if "mbarrier" in q:
        return e.call(cp_async.mbarrier_arrive, e.address(i.args[0], "shared"), "noinc" in q)
    partial = len(i.args) > 3 and i.args[3][0] in ("imm", "reg")
    e.call(
        cp_async.copy,
        e.pc,
        i.args[2][1],
        e.address(i.args[0], "shared"),
        e.address(i.args[1], "global"),
        e.src(i.args[3], "u32") if partial else None,
    )
