"""Instructions that end a segment: branches, exits, and waits on barriers."""

from __future__ import annotations

from ..errors import KernelError, Unsupported
from ..execution import calls, fragments, register_file, sync
from ..memory import mbarrier
from .registry import terminates


def _guard(e, i, after) -> None:
    """A predicated terminator: lanes that do not take part go around it."""
    if i.pred:
        p = f"P[{e.register(i.pred)[1]}]"
        e.line(f"t={e.bind(fragments.guard)}(w,fr,{p},{i.neg},{e.pc},{after})")
        e.line("if t is not None: return t")


@terminates("bra")
def bra(e, i, after):
    target = e.kernel.labels[i.args[0][1]]
    if not i.pred:
        return e.line(f"return {target}")
    p = f"P[{e.register(i.pred)[1]}]"
    then, otherwise = (after, target) if i.neg else (target, after)
    if e.mask is None:
        e.line(f"b={p}.tobytes()")
        e.line(f"if b==w.ones: return {then}")
        e.line(f"if b==w.zeros: return {otherwise}")
        return e.line(f"return {e.bind(fragments.split)}(w,fr,{p},{then},{otherwise})")
    e.line(f"return {e.bind(fragments.branch)}(w,fr,{p},{then},{otherwise})")


@terminates("ret", "exit")
def leave(e, i, after):
    _guard(e, i, after)
    e.line(f"return {e.bind(fragments.leave)}(w,fr)")


def _trap():
    raise KernelError("trap executed")


@terminates("trap")
def trap(e, i, after):
    _guard(e, i, after)
    e.line(f"{e.bind(_trap)}()")


@terminates("call")
def call(e, i, after):
    name = i.args[0][1]
    if name not in calls.FUNCTIONS:
        raise Unsupported(f"call of the function {name}")
    _guard(e, i, after)
    parameters, results = ([e.kernel.local[x[1]] for x in operands[1]] for operands in i.args[1:])
    e.line(f"{e.bind(calls.FUNCTIONS[name])}(w,fr.mask,{parameters},{results})")
    e.line(f"return {after}")


@terminates("nanosleep")
def nanosleep(e, i, after):
    _guard(e, i, after)
    e.line(f"return {e.bind(fragments.pause)}(w,fr,{after})")


@terminates("setmaxnreg")
def setmaxnreg(e, i, after):
    _guard(e, i, after)
    grows, count = "inc" in i.parts, i.args[0][1]
    e.line(f"return {e.bind(register_file.change)}(w,fr,{grows},{count},{e.pc},{after})")


@terminates("mbarrier")
def mbarrier_wait(e, i, after):
    _guard(e, i, after)
    parity = "parity" in i.parts
    row, address = e.dst(i.args[0], "u32"), e.address(i.args[1], "shared")
    x = e.src(i.args[2], "u32" if parity else "u64")
    how = (parity, i.parts[1] == "try_wait")
    e.line(f"return {e.bind(mbarrier.wait)}(w,fr,{row},{address},{x},{how},{e.pc},{after})")


@terminates("bar", "barrier")
def barrier(e, i, after):
    _guard(e, i, after)
    if "warp" in i.parts:
        return e.line(f"return {e.bind(sync.warp_sync)}(w,fr,{after})")
    if "cluster" in i.parts:
        f = sync.cluster_arrive if "arrive" in i.parts else sync.cluster_wait
        return e.line(f"return {e.bind(f)}(w,fr,{e.pc},{after})")
    if "red" in i.parts:
        raise Unsupported("bar.red")
    number = e.src(i.args[0], "u32")
    count = e.src(i.args[1], "u32") if len(i.args) > 1 else None
    e.line(
        f"return {e.bind(sync.barrier)}(w,fr,{number},{count},{'arrive' in i.parts},{e.pc},{after})"
    )
