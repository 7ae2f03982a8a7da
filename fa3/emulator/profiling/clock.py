"""Nominal time: a cost for everything that happens, so that a timeline has an order and a scale.

Cycles of one SM of an H100.  They are bounds by throughput: dependences, the latency of plain
loads, and warps of different warpgroups that want the same unit (but for the tensor cores and the
copy engine, which take one thing after another) are left out.

Sources: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", column 9.0
(results per cycle and SM; a sub-partition has a quarter of it, and a warp 32 lanes); H100 white
paper, 989.4 TFLOP/s dense in bf16 with 132 SMs at 1.83 GHz; A100 white paper, 5120 bytes per cycle
from L2 (none is given for H100).  COPY_LATENCY is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

# class of instruction (classes.py) -> (unit, cycles that a warp instruction occupies it)
UNITS = {
    "exp2": ("mufu", 8),  # 16 results
    "mufu": ("mufu", 8),
    "float": ("fma", 1),  # 128 results
    "compare": ("alu", 2),  # 64 results, as all of the ALU
    "integer": ("alu", 2),
    "convert": ("alu", 2),
    "warp": ("lsu", 4),  # 32 results of an SM, whose four sub-partitions share it
}
FREE = {"move"}  # the assembler removes nearly all of these; the others take a slot to issue
MMA_FLOPS = {4: 2048, 2: 4096, 1: 8192}  # by bytes of an element of A; per cycle and SM
SUB_PARTITIONS = 4
COPY_LATENCY = 600  # from the issue of a copy to its first bytes
COPY_BYTES = 5120 / 132  # per cycle and SM, one copy after another


@dataclass(frozen=True, eq=False)
class Step:
    """A stretch of a chain of causes: what happened from start to end, and what let it start."""

    kind: str
    start: float
    end: float
    before: Step | None

    def shares(self) -> dict[str, float]:
        """Cycles by kind along the chain that ends here."""
        found: dict[str, float] = {}
        step: Step | None = self
        while step is not None:
            found[step.kind] = found.get(step.kind, 0) + step.end - step.start
            step = step.before
        return found


class Moment:
    """When a fragment is, how many hand-overs led there, and what it waited for last."""

    __slots__ = ("time", "depth", "step", "span")

    def __init__(self, time: float = 0, depth: int = 0, step: Step | None = None):
        self.time, self.depth, self.step = time, depth, step
        self.span = None  # of the timeline, still growing

    def copy(self) -> Moment:
        return Moment(self.time, self.depth, self.step)

    def join(self, other: Moment) -> None:
        """The lanes of two fragments go on together."""
        if other.time > self.time:
            self.time, self.step, self.span = other.time, other.step, other.span
        self.depth = max(self.depth, other.depth)

    def cause(self) -> Step:
        """The chain of causes up to now."""
        start = 0 if self.step is None else self.step.end
        return Step("instructions", start, self.time, self.step)


class Handover:
    """What those who arrive at a barrier pass on to those who wait there."""

    __slots__ = ("cause", "depths")

    def __init__(self):
        self.cause: Step | None = None  # that of the last
        self.depths: dict[int, int] = {}  # of agents: bits of warps, 0 for a copy

    def add(self, cause: Step, depth: int, agent: int = 0) -> None:
        if self.cause is None or cause.end > self.cause.end:
            self.cause = cause
        self.depths[agent] = max(depth, self.depths.get(agent, 0))

    def depth(self, agent: int) -> int:
        """After waiting for the others; 0 if the agent is one warp and nobody else arrived."""
        others = (d + 1 for a, d in self.depths.items() if a != agent or a & (a - 1))
        return max(others, default=0)


class Engine:
    """A unit that does one thing after another."""

    __slots__ = ("last",)

    def __init__(self):
        self.last: Step | None = None

    def work(self, kind: str, moment: Moment, cycles: float) -> Step:
        """Issued at a moment, done when the unit is free."""
        before = moment.cause()
        if self.last is not None and self.last.end > before.end:
            before = self.last
        self.last = Step(kind, before.end, before.end + cycles, before)
        return self.last


class Groups:
    """Commit groups: per owner an open one and committed ones, oldest first, each by its end."""

    def __init__(self):
        self._open: dict = {}
        self._committed: dict = {}

    def add(self, owner, step: Step) -> None:
        self._open[owner] = later(self._open.get(owner), step)

    def commit(self, owner) -> None:
        self._committed.setdefault(owner, []).append(self._open.pop(owner, None))

    def drain(self, owner, keep: int) -> Step | None:
        """The last to end of all but the `keep` youngest."""
        groups = self._committed.get(owner, [])
        done = groups[: max(0, len(groups) - keep)]
        del groups[: len(done)]
        last = None
        for step in done:
            last = later(last, step)
        return last


def later(a: Step | None, b: Step | None) -> Step | None:
    if a is None or b is None:
        return b if a is None else a
    return b if b.end > a.end else a
