"""Matrix instructions: wgmma, mma, ldmatrix, stmatrix."""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from ..matrix import ldmatrix, mma, wgmma
from .emitter import vector
from .registry import lowers

_TYPES = ("f16", "bf16", "f32", "tf32", "e4m3", "e5m2", "s8", "s32", "u8")


@lowers("wgmma")
def wgmma_(e, i):
    action = i.parts[1]
    if action == "fence":
        return e.line(f"{e.bind(wgmma.fence)}(w)")
    if action == "commit_group":
        return e.line(f"{e.bind(wgmma.commit)}(w)")
    if action == "wait_group":
        return e.line(f"{e.bind(wgmma.wait)}(w,{i.args[0][1]})")
    if "sp" in i.parts:
        raise Unsupported("sparse wgmma")
    a = None if i.args[1][0] == "vec" else e.src(i.args[1], "u64")
    scale = i.args[3]
    accumulate = bool(scale[1]) if scale[0] == "imm" else e.pred(scale)
    e.line(
        f"{e.bind(wgmma.issue)}(w,{e.bind(_shape(e, i))},{a},{e.src(i.args[2], 'u64')},"
        f"{accumulate})"
    )


def _shape(e, i) -> wgmma.Shape:
    shape = next(x for x in i.parts if x.startswith("m64n"))
    n, k = (int(x) for x in shape[4:].split("k"))
    types = [x for x in i.parts if x in _TYPES]
    accumulator = np.array([e.index(x) for x in i.args[0][1]])
    registers = np.array([e.index(x) for x in i.args[1][1]]) if i.args[1][0] == "vec" else None
    # immediates: scale-a, scale-b, then trans-a, trans-b (only trans-b with A in registers)
    flags = [x[1] for x in i.args[4:]]
    signs, transposed = flags[:2] or [1, 1], flags[2:]
    if len(transposed) == 1:
        transposed = [0, *transposed]
    trans_a, trans_b = transposed or (0, 0)
    contiguous = (np.diff(accumulator) == 1).all()
    used = frozenset(registers.tolist()) if registers is not None else frozenset()
    return wgmma.Shape(
        n,
        k,
        tuple(types),
        (bool(trans_a), bool(trans_b)),
        signs[0] * signs[1] < 0,
        "satfinite" in i.parts,
        slice(int(accumulator[0]), int(accumulator[-1]) + 1) if contiguous else accumulator,
        registers,
        (frozenset(accumulator.tolist()), used),
        e.pc,
    )


@lowers("mma")
def mma_(e, i):
    shape = next(x for x in i.parts if x.startswith("m16"))
    if not shape.startswith("m16n8k") or "sp" in i.parts:
        raise Unsupported("mma shape")
    types = tuple(x for x in i.parts if x in _TYPES)
    d, a, b = ([e.index(x) for x in vector(v)] for v in i.args[:3])
    c = e.rows([e.src(x, "u32") for x in vector(i.args[3])])
    e.call(mma.mma, (int(shape[6:]), types, "satfinite" in i.parts), d, a, b, c)


@lowers("ldmatrix", "stmatrix")
def ldmatrix_(e, i):
    if "m8n8" not in i.parts or i.parts[-1] != "b16":
        raise Unsupported(f"{i.parts[0]} form")
    loads = i.parts[0] == "ldmatrix"
    registers, address = (i.args[0], i.args[1]) if loads else (i.args[1], i.args[0])
    rows = e.rows([(e.dst if loads else e.src)(x, "u32") for x in vector(registers)])
    e.call(
        ldmatrix.load if loads else ldmatrix.store,
        rows,
        e.address(address, "shared"),
        "trans" in i.parts,
    )
