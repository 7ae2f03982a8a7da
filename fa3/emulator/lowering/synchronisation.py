"""mbarrier operations that do not wait, fences, and hints that do nothing here."""

from __future__ import annotations

from ..errors import Unsupported
from ..memory import generic, mbarrier
from .registry import lowers


@lowers("mbarrier")
def mbarrier_(e, i):
    action, a = i.parts[1], i.args
    if action == "init":
        e.call(mbarrier.init, e.address(a[0], "shared"), e.src(a[1], "u32"))
    elif action == "inval":
        e.call(mbarrier.invalidate, e.address(a[0], "shared"))
    elif action in ("expect_tx", "complete_tx"):
        e.call(
            mbarrier.transaction,
            e.address(a[0], "shared"),
            e.src(a[1], "u32"),
            1 if action == "complete_tx" else -1,
        )
    elif action == "arrive":
        token, a = (("sink",), a) if a[0][0] == "mem" else (a[0], a[1:])
        x = e.src(a[1], "u32") if len(a) > 1 else None
        e.call(
            mbarrier.arrive,
            e.dst(token, "u64"),
            e.address(a[0], "shared"),
            x,
            "expect_tx" in i.parts,
        )
    else:
        raise Unsupported(f"mbarrier.{action}")


@lowers("fence", "membar")
def fence(e, i):
    """Memory is sequentially consistent here; the checks follow what fences order."""
    if "proxy" in i.parts and any(x.startswith("async") for x in i.parts):
        e.call(mbarrier.fence_async)
    elif "mbarrier_init" in i.parts:
        e.call(mbarrier.publish)
    elif "proxy" not in i.parts and not {"gpu", "sys", "gl"}.isdisjoint(i.parts):
        e.call(generic.fence)


@lowers(
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "applypriority",
    "discard",
    "createpolicy",
    "pmevent",
    "brkpt",
)
def hint(e, i):
    """No effect on results."""
