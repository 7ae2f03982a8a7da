"""The machine at work: one warp of each consumer warpgroup on one SMSP, cycle by cycle.

Where the producer transposes V, its warp runs beside them, as far ahead as its ring has slots.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from .machine import Machine
from .ops import VECTOR, Op, decode_all, loaded_bytes
from .producer import Beside
from .trace import Trace

NEVER = float("inf")
SKEWS = (0, 150, 400, 700, 1100)  # cycles by which each warpgroup starts after the one before
ITERATIONS = 40
STARVED = 20  # times the iterations asked for that one warp may do while another does none
NO_BARRIER = 7
UNITS = ("tensor", "stolen", "issue", "fma", "alu", "xu", "lsu", "uniform", "sums")
WAITS = {
    "mma": "tensor queue",
    "sums": "sums in L2",
    "copied": "sums in L2",
    "depbar": "wait for MMA",
    "turn": "barrier",
    "meet": "barrier",
}


class Mma:
    """One MMA in the tensor core's queue; its times move while it is pending."""

    __slots__ = ("warp", "start", "end", "smem")

    def __init__(self, warp: int, start: float, end: float, smem: float):
        self.warp, self.start, self.end, self.smem = warp, start, end, smem


@dataclass
class Result:
    cycles: float  # per iteration of the CTA tile
    flops: int  # per iteration of the CTA tile
    busy: dict[str, float]  # unit -> share of the time; "stolen": tensor time lost to contention
    stalls: dict[str, float]  # reason -> share of the warps' time
    events: list  # Mma objects, and (warp, time, kind) of instructions that read registers
    end: float
    spread: float = 0  # of the cycles, over the starting skews


class Warp:
    def __init__(self, ops: list[Op], start: float):
        self.ops, self.pc, self.iteration = ops, 0, 0
        self.ready = start
        self.scoreboards = [0.0] * 6  # when each is released
        self.groups: list[Mma] = []  # the last MMA of every committed group
        self.turns = self.meets = 0  # barriers passed
        self.copies: list[float] = []  # when the last of its copies have left shared memory
        self.reasons: Counter = Counter()

    @property
    def op(self) -> Op:
        return self.ops[self.pc]

    @property
    def progress(self) -> float:
        return self.iteration + self.pc / len(self.ops)


@dataclass
class Choice:
    """The next instruction to issue and what held it back."""

    time: float
    warp: int
    scoreboard: float = 0
    unit: float = 0


def simulate(
    traces: list[Trace],
    machine: Machine,
    iterations: int = ITERATIONS,
    producer: Beside | None = None,
    all_begin: bool = False,
) -> Result:
    """The median of runs from several starting skews between the warpgroups, and their spread.

    all_begin: as of Simulation.
    """
    runs = [Simulation(traces, machine, k, producer, all_begin).run(iterations) for k in SKEWS]
    runs.sort(key=lambda r: r.cycles)
    middle = runs[len(runs) // 2]
    middle.spread = (runs[-1].cycles - runs[0].cycles) / middle.cycles
    return middle


def kv_bytes(trace: Trace) -> int:
    """Bytes of K and V in one iteration, which TMA brings once: what the MMAs read as B."""
    return sum(loaded_bytes(x) for x in trace if x.is_mma)


@dataclass
class Simulation:
    """One warp per trace, started `skew` cycles after each other."""

    traces: list[Trace]
    machine: Machine
    skew: int
    producer: Beside | None = None
    all_begin: bool = False  # no warp's first turn waits for another's; else warp 0's alone
    now: float = 0.0
    last: int = 0  # the warp that issued last
    limit: int = 0  # iterations of one warp
    used: Counter = field(default_factory=Counter)
    events: list = field(default_factory=list)

    def __post_init__(self):
        count = len(self.traces)
        ops = [decode_all(trace, self.machine, count) for trace in self.traces]
        self.warps = [Warp(x, w * self.skew) for w, x in enumerate(ops)]
        self.consumers = self.warps[:]
        if self.producer:
            transposing = Warp(self.producer.ops(self.machine), 0)
            transposing.iteration = self.producer.ahead  # or all consumers would begin at once
            self.warps.append(transposing)
        self.ring = all({"turn", "pass"} <= {op.kind for op in x} for x in ops)
        names = ("fma0", "fma1", "alu", "xu", "uniform", "lsu", "registers")
        self.free = dict.fromkeys(names, 0.0)
        self.pending: deque[Mma] = deque(maxlen=16)  # issued, in order of execution
        self.sums: deque[float] = deque([0.0], maxlen=64)  # when L2 has taken each RED or copy
        self.passes: list[list[float]] = [[] for _ in ops]  # times of BAR.ARV
        self.arrivals: list[list[float]] = [[] for _ in ops]  # at barriers of all consumers
        bytes_ = kv_bytes(self.traces[0])
        self.interval = bytes_ / self.machine.l2_bytes if self.machine.l2_bytes else 0
        self.available = {
            "fma": lambda w: min(self.free["fma0"], self.free["fma1"]),
            "heavy": lambda w: self.free["fma0"],
            "mma": self._queue_free,
            "sums": self._sums_queue_free,
            "copied": self._copies_left,
            "depbar": self._groups_done,
            "turn": self._turn_comes,
            "meet": self._all_arrive,
        }

    def run(self, iterations: int) -> Result:
        """Until each warp has done `iterations`; measures the second half."""
        half, since, before = iterations // 2, None, 0.0
        self.limit = STARVED * iterations
        while (done := min(warp.iteration for warp in self.consumers)) < iterations:
            if since is None and done >= half:
                since = self.now
                self.used.clear()
                for warp in self.warps:
                    warp.reasons.clear()
                before = sum(warp.progress for warp in self.consumers)
            self._issue(self._choose())
        return self._result(self.now - since, sum(w.progress for w in self.consumers) - before)

    def _result(self, total: float, done: float) -> Result:
        reasons = sum((warp.reasons for warp in self.consumers), Counter())
        every = sum(reasons.values())
        return Result(
            cycles=total * len(self.consumers) / done,
            flops=sum(op.flops for warp in self.consumers for op in warp.ops),
            busy={unit: self.used[unit] / total for unit in UNITS},
            stalls={reason: count / every for reason, count in reasons.most_common()},
            events=self.events,
            end=self.now,
        )

    def _choose(self) -> Choice:
        """Greedy: the warp that issued last goes first."""
        best, count = None, len(self.warps)
        for distance in range(count):
            w = (self.last + distance) % count
            warp = self.warps[w]
            op = warp.op
            scoreboard = 0.0
            if op.wait:
                scoreboard = max(warp.scoreboards[k] for k in range(6) if op.wait >> k & 1)
            unit = self._unit_free(w, op) if self._may_begin(warp) else NEVER
            time = max(warp.ready, scoreboard, unit, self.now)
            if best is None or time < best.time:
                best = Choice(time, w, scoreboard, unit)
        if best.time == NEVER:
            raise RuntimeError("deadlock: every warp waits for another")
        return best

    def _may_begin(self, warp: Warp) -> bool:
        """An iteration needs its block of V transposed; the transpose needs an empty slot."""
        if warp.pc or self.producer is None:
            return True
        if warp is self.warps[-1]:
            slowest = min(other.iteration for other in self.consumers)
            return warp.iteration < slowest + self.producer.ahead
        return warp.iteration < self.warps[-1].iteration

    def _unit_free(self, w: int, op: Op) -> float:
        """When the op's unit, queue or barrier, and its operands' read ports, are free."""
        when = self.available.get(op.kind)
        unit = when(w) if when else self.free.get(op.kind, 0)
        return max(unit, self.free["registers"]) if op.reads else unit

    def _queue_free(self, w: int) -> float:
        depth = self.machine.mma_queue
        return self.pending[-depth].start if len(self.pending) >= depth else 0

    def _sums_queue_free(self, w: int) -> float:
        depth = self.machine.sums_queue
        return self.sums[-depth] if len(self.sums) >= depth else 0

    def _copies_left(self, w: int) -> float:
        warp = self.warps[w]
        keep = warp.op.keep
        return warp.copies[-1 - keep] if len(warp.copies) > keep else 0

    def _groups_done(self, w: int) -> float:
        warp = self.warps[w]
        keep = warp.op.keep
        if len(warp.groups) <= keep:
            return 0
        return warp.groups[-1 - keep].end + self.machine.mma_drain

    def _turn_comes(self, w: int) -> float:
        """A warpgroup's turn follows its predecessor's, that one's same turn or the one before."""
        need = self.warps[w].turns + (w > 0 and not self.all_begin)
        if not self.ring or not need:
            return 0
        log = self.passes[w - 1]
        return NEVER if need > len(log) else log[need - 1] + self.machine.lat_bar

    def _all_arrive(self, w: int) -> float:
        """The last to arrive releases the rest."""
        warp = self.warps[w]
        if len(self.arrivals[w]) <= warp.meets:
            self.arrivals[w].append(max(warp.ready, self.now))
        times = [log[warp.meets] if len(log) > warp.meets else NEVER for log in self.arrivals]
        return max(times) + self.machine.lat_bar

    def _issue(self, choice: Choice) -> None:
        warp, t = self.warps[choice.warp], choice.time
        op = warp.op
        self._account(warp, op, choice)
        if (op.reads or op.smem) and op.kind != "mma" and self.pending and self.pending[-1].end > t:
            self._contend(op, t)
        self._occupy(choice.warp, op, t)
        if op.write_barrier != NO_BARRIER:
            k = op.write_barrier
            warp.scoreboards[k] = max(warp.scoreboards[k], t + op.latency)
        if op.read_barrier != NO_BARRIER:
            k = op.read_barrier
            warp.scoreboards[k] = max(warp.scoreboards[k], t + self.machine.lat_read)
        refetch = self.machine.branch if op.kind == "branch" else 0
        warp.ready = t + max(1, op.stall) + refetch
        warp.pc += 1
        if warp.pc == len(warp.ops):
            warp.pc = 0
            warp.iteration += 1
            if warp.iteration > self.limit:
                raise RuntimeError("one warp never waits, and the greedy scheduler starves another")
            warp.ready = max(warp.ready, warp.iteration * self.interval)
        self.now, self.last = t + 1, choice.warp

    def _account(self, warp: Warp, op: Op, choice: Choice) -> None:
        """Book the time since the warp was ready under what it waited for."""
        when = max(warp.ready, choice.scoreboard, choice.unit)
        if when > warp.ready:
            if choice.scoreboard >= choice.unit:
                reason = "scoreboard"
            elif op.reads and choice.unit == self.free["registers"]:
                reason = "registers"
            else:
                reason = WAITS.get(op.kind, f"{op.kind} pipe")
            warp.reasons[reason] += when - warp.ready
        warp.reasons["not selected"] += choice.time - when
        warp.reasons["issue"] += 1
        warp.reasons["stall count"] += max(0, op.stall - 1)
        self.used["issue"] += 1

    def _contend(self, op: Op, t: float) -> None:
        """Register and shared-memory cycles taken from the running and the waiting MMAs."""
        running = next(mma for mma in self.pending if mma.end > t)
        lost = self.machine.steal * op.reads + self.machine.smem_share * op.smem * running.smem
        for mma in reversed(self.pending):
            if mma.end <= t:
                break
            mma.end += lost
            if mma.start > t:
                mma.start += lost
        self.used["stolen"] += lost
        self.free["registers"] = t + 1 + self.machine.slow * op.reads

    def _occupy(self, w: int, op: Op, t: float) -> None:
        """Take the unit or pass the barrier."""
        kind, warp = op.kind, self.warps[w]
        if kind in ("fma", "heavy"):
            first = kind == "heavy" or self.free["fma0"] <= self.free["fma1"]
            self.free["fma0" if first else "fma1"] = t + op.busy
            self.used["fma"] += op.busy / 2
        elif kind in self.free:
            self.free[kind] = t + op.busy
            self.used[kind] += op.busy
        elif kind == "sums":
            self.sums.append(max(t, self.sums[-1]) + op.busy)
            self.used[kind] += op.busy
        elif kind == "copy":
            self.sums.append(max(t, self.sums[-1]) + op.busy)
            warp.copies = [*warp.copies[-7:], self.sums[-1]]
            self.used["sums"] += op.busy
        elif kind == "mma":
            self._start_mma(w, op, t)
        elif kind == "pass":
            self.passes[w].append(t)
        elif kind == "turn":
            warp.turns += 1
        elif kind == "meet":
            warp.meets += 1
        if kind in VECTOR:
            self.events.append((w, t, kind))

    def _start_mma(self, w: int, op: Op, t: float) -> None:
        idle = self.pending[-1].end if self.pending else 0
        start = max(t + self.machine.mma_start, idle)
        mma = Mma(w, start, start + op.busy, op.smem)
        self.pending.append(mma)
        self.events.append(mma)
        self.used["tensor"] += op.busy
        if op.last:
            warp = self.warps[w]
            warp.groups = [*warp.groups[-7:], mma]
