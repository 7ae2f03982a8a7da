"""Communication inside a warp: elect, shfl, vote, match, redux, activemask."""

from __future__ import annotations

from ..errors import Unsupported
from ..execution import warp_ops
from ..execution.warpgroup import LANES
from .emitter import instr_type, pair
from .registry import lowers


@lowers("elect")
def elect(e, i):
    lane, predicate = pair(i.args[0])
    if predicate is None:
        lane, predicate = ("sink",), lane
    e.line(f"t,s={e.bind(warp_ops.elect)}(w,{e.mask})")
    e.put(e.dst(predicate, "u32"), "t")
    e.put(e.dst(lane, "u32"), "s")


@lowers("shfl")
def shfl(e, i):
    mode, (d, valid) = i.parts[2], pair(i.args[0])
    a, b, c = (e.src(x, "u32") for x in i.args[1:4])
    if i.args[2][0] == i.args[3][0] == "imm":
        source, ok = warp_ops.shuffle_sources(mode, i.args[2][1], i.args[3][1], LANES)
        values = f"{a}[{e.bind(source)}[:w.lanes]]" if i.args[1][0] == "reg" else a
        e.put(e.dst(d, "u32"), values)
        if valid is not None:
            e.put(e.dst(valid, "u32"), f"{e.bind(ok)}[:w.lanes]")
        return
    e.line(f"t,s={e.bind(warp_ops.shuffle)}(w,{e.mask},'{mode}',{a},{b},{c})")
    e.put(e.dst(d, "u32"), "t")
    if valid is not None:
        e.put(e.dst(valid, "u32"), "s")


@lowers("vote")
def vote(e, i):
    e.put(
        e.dst(i.args[0], "u32"),
        f"{e.bind(warp_ops.vote)}(w,{e.mask},'{i.parts[2]}',{e.pred(i.args[1])})",
    )


@lowers("activemask")
def activemask(e, i):
    e.put(e.dst(i.args[0], "u32"), f"{e.bind(warp_ops.vote)}(w,{e.mask},'ballot',w.all)")


@lowers("match")
def match(e, i):
    if i.parts[1] != "any":
        raise Unsupported("match.all")
    e.put(
        e.dst(i.args[0], "u32"),
        f"{e.bind(warp_ops.match_any)}(w,{e.mask},{e.src(i.args[1], instr_type(i))})",
    )


@lowers("redux")
def redux(e, i):
    t = instr_type(i)
    e.put(
        e.dst(i.args[0], t),
        f"{e.bind(warp_ops.reduce)}(w,{e.mask},'{i.parts[2]}',{e.src(i.args[1], t)})",
    )
