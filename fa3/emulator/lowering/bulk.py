"""cp (all of its forms), tensormap."""

from __future__ import annotations

from ..errors import Unsupported
from ..memory import bulk, tensormap
from .emitter import DTYPE
from .memory import cp_async_ampere
from .registry import lowers

_REDUCTIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")


@lowers("cp")
def cp(e, i):
    q = i.parts
    if "prefetch" in q:
        return
    if "bulk" not in q:
        return cp_async_ampere(e, i)
    if "commit_group" in q:
        return e.call(bulk.commit)
    if "wait_group" in q:
        return e.call(bulk.wait, i.args[0][1])
    reduction = next((x for x in _REDUCTIONS if x in q), None) if q[1] == "reduce" else None
    (_tensor if "tensor" in q else _bulk)(e, i, reduction)


def _map(e, operand) -> str:
    """(tensor map address, [coordinates])"""
    coords = ",".join(e.src(x, "s32") for x in operand[2])
    return f"({e.src(operand[1], 'u64')},[{coords}])"


def _multicast(e, i, position: int) -> str | None:
    return e.src(i.args[position], "u16") if "multicast::cluster" in i.parts else None


def _tensor(e, i, reduction):
    if "im2col" in i.parts:
        raise Unsupported("im2col")
    a = i.args
    if a[0][0] == "map":
        return e.call(
            bulk.tensor_store, e.pc, _map(e, a[0]), e.address(a[1], "shared"), repr(reduction)
        )
    e.call(
        bulk.tensor_load,
        e.pc,
        e.address(a[0], "shared"),
        _map(e, a[1]),
        e.address(a[2], "shared"),
        _multicast(e, i, 3),
    )


def _bulk(e, i, reduction):
    q, a = i.parts, i.args
    size = e.src(a[2], "u32")
    own = q.index("shared::cta") if "shared::cta" in q else len(q)
    if q[-1] == "global" or "global" in q and q.index("global") < own < len(q):
        kind = next((x for x in reversed(q) if x in DTYPE), "b8")
        return e.call(
            bulk.store,
            e.pc,
            e.address(a[0], "global"),
            e.address(a[1], "shared"),
            size,
            repr((reduction, kind) if reduction else None),
        )
    destination, barrier = e.address(a[0], "shared"), e.address(a[3], "shared")
    if own < len(q) and "global" not in q:
        return e.call(bulk.between_ctas, destination, e.address(a[1], "shared"), size, barrier)
    e.call(
        bulk.load,
        e.pc,
        destination,
        f"({e.address(a[1], 'global')},{size})",
        barrier,
        _multicast(e, i, 4),
    )


@lowers("tensormap")
def tensormap_(e, i):
    """tensormap.replace.tile.FIELD and tensormap.cp_fenceproxy."""
    q, a = i.parts, i.args
    if q[1] == "cp_fenceproxy":
        return e.call(tensormap.copy, e.address(a[0], "global"), e.address(a[1], "shared"), a[2][1])
    field = q[3]
    if q[1] != "replace" or field not in ("global_address", "global_dim", "global_stride"):
        raise Unsupported("tensormap field")
    space = "shared" if any(x.startswith("shared") for x in q) else "global"
    ordinal = a[1][1] if field != "global_address" else 0
    value = e.src(a[-1], "u32" if field == "global_dim" else "u64")
    e.call(tensormap.replace, repr(space), e.address(a[0], space), repr(field), ordinal, value)
