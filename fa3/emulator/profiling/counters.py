"""Counters: what the warps of a kernel did, by their role."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields

ROLES = {
    "mma": "warps that issue matrix products",
    "load": "others that issue bulk loads or cp.async",
    "other": "the rest",
}
WAVEFRONT_BYTES = 128
WAITS = ("mbarrier", "named barrier", "cluster barrier", "wgmma", "bulk group", "cp.async group")


class _Sum:
    """Dataclasses of numbers, dicts and dataclasses of this kind, added field by field."""

    def __iadd__(self, other):
        for f in fields(self):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, _added(mine, its))
        return self


def _added(mine, its):
    if isinstance(mine, dict):
        for key, value in its.items():
            mine[key] = _added(mine[key], value) if key in mine else _added(_empty(value), value)
        return mine
    mine += its
    return mine


def _empty(value):
    return type(value)()


@dataclass
class Bytes(_Sum):
    """Moved; whole: boxes as shared memory has them, clipped: the part inside of the tensor."""

    bulk_loaded: int = 0  # written to shared memory, whole, once per CTA that gets them
    bulk_read: int = 0  # of those, read from global memory, clipped
    bulk_stored: int = 0  # read from shared memory, whole
    bulk_written: int = 0  # of those, written to global memory, clipped
    cp_async: int = 0  # read by cp.async
    loaded: int = 0  # by ld, from global memory, all lanes
    stored: int = 0  # by st
    summed: int = 0  # added to global memory by atom, red and bulk stores that add, clipped
    operands: int = 0  # read from shared memory by wgmma


@dataclass
class SharedAccesses(_Sum):
    """Of one kind of instruction, in instructions of a warp."""

    instructions: int = 0
    wavefronts: int = 0
    conflicts: int = 0  # wavefronts beyond the fewest for such an access


@dataclass
class Waits(_Sum):
    executed: int = 0  # by a warp, or by lanes of it that are apart
    blocked: int = 0  # of those, in nominal time
    cycles: float = 0.0  # nominal, over all of them


@dataclass
class Counters(_Sum):
    """Of the warps of one role, over all CTAs."""

    warps: int = 0  # of a CTA
    instructions: dict[str, int] = field(default_factory=dict)  # of warps, by classes.CLASSES
    lanes: dict[str, int] = field(default_factory=dict)  # the same times the lanes that took part
    mmas: int = 0  # wgmma of a warpgroup, mma.sync of a warp
    flops: int = 0  # of those: 2 m n k each
    exponentials: int = 0  # results of ex2
    bytes: Bytes = field(default_factory=Bytes)
    shared: dict[str, SharedAccesses] = field(default_factory=dict)  # ld, st, ldmatrix, stmatrix
    waits: dict[str, Waits] = field(default_factory=dict)  # by what was waited for: WAITS

    def access(self, kind: str, wavefronts: int, conflicts: int) -> None:
        """An access to shared memory by one warp."""
        accesses = self.shared.setdefault(kind, SharedAccesses())
        accesses.instructions += 1
        accesses.wavefronts += wavefronts
        accesses.conflicts += conflicts

    def wait(self, kind: str, cycles: float) -> None:
        waits = self.waits.setdefault(kind, Waits())
        waits.executed += 1
        waits.blocked += cycles > 0
        waits.cycles += cycles

    @property
    def conflicts(self) -> int:
        return sum(x.conflicts for x in self.shared.values())

    @property
    def shared_cycles(self) -> float:
        """Cycles of an SM's shared memory: of wavefronts, copies and operands of wgmma."""
        moved = self.bytes.bulk_loaded + self.bytes.bulk_stored + self.bytes.cp_async
        wavefronts = sum(x.wavefronts for x in self.shared.values())
        return wavefronts + (moved + self.bytes.operands) / WAVEFRONT_BYTES

    @property
    def role(self) -> str:
        """Of a warp with these counters."""
        if self.instructions.get("mma"):
            return "mma"
        return "load" if self.bytes.bulk_loaded or self.bytes.cp_async else "other"

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def by_role(warps: Iterable[Counters]) -> dict[str, Counters]:
    """The sums of the counters of single warps."""
    found: dict[str, Counters] = {}
    for warp in warps:
        found.setdefault(warp.role, Counters()).__iadd__(warp)
    return {role: found[role] for role in ROLES if role in found}


def total(counters: Iterable[Counters]) -> Counters:
    result = Counters()
    for x in counters:
        result += x
    return result


def _add(counts: dict[str, int], name: str, n: int) -> None:
    counts[name] = counts.get(name, 0) + n


class Tally:
    """The counters of a launch while it runs.

    Of each stretch of code only its executions are counted, by warpgroup and mask of lanes.
    """

    def __init__(self, warps: int):
        self.executed: dict[tuple, int] = {}  # (warpgroup, stretch key, mask) -> times
        self.warps = [Counters(warps=1) for _ in range(warps)]

    def finish(self, stretches: dict, lanes_of: dict) -> list[Counters]:
        """Counters by warp.

        stretches: key -> classes.Stretch; lanes_of: mask -> active lanes by warp of the warpgroup.
        """
        for (warpgroup, key, mask), times in self.executed.items():
            stretch = stretches[key]
            for i, lanes in enumerate(lanes_of[mask]):
                if not lanes:
                    continue
                warp = self.warps[4 * warpgroup + i]
                warp.exponentials += stretch.exponentials * lanes * times
                for name, n in stretch.classes.items():
                    _add(warp.instructions, name, n * times)
                    _add(warp.lanes, name, n * lanes * times)
        self.executed.clear()
        return self.warps
