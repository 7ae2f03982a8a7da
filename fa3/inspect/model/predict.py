"""Cubin -> Prediction."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from ..flow import Flow
from ..loops import MainLoop
from ..report import Report, analyse
from .machine import CLOCK, RIVALS, SMS, TAIL, Machine
from .ops import decode, is_ring
from .producer import AHEAD, WARPS, Beside, Transpose, loaded_per_step, transpose, v_bytes
from .simulate import ITERATIONS, Result, kv_bytes, simulate
from .trace import Trace, trace
from .traffic import Sums, Traffic, bytes_loaded

BULK_SUMS = ("UBLKRED", "UTMAREDG")  # copies that add to global memory
FULL = 0.95  # share of the time from which on a unit is the bound
WAITED = 0.1  # share of the warps' time from which on they wait for something worth a word

Edit = Callable[[Trace], Trace]


@dataclass(frozen=True)
class Settings:
    """What a prediction assumes beyond the kernel."""

    machine: Machine = Machine()
    clock: float = CLOCK  # GHz
    tail: float = TAIL
    iterations: int = ITERATIONS
    consumers: int | None = None  # warpgroups; None: all of the launch but one
    flops: int | None = None  # of attention, per iteration; None: those of all matrix products
    transposers: int = WARPS  # of the producer's warps; 0: what if V needed no transpose
    ahead: int = AHEAD  # blocks of V that they may be before the consumers
    rescale_always: bool = False  # run what the steady state jumps over or leaves out, see trace
    edits: tuple[Edit, ...] = ()  # what-ifs, applied to each warp's trace in turn


@dataclass(frozen=True)
class Prediction:
    report: Report
    settings: Settings
    traces: list[Trace]  # one steady iteration of each consumer warpgroup
    transpose: Transpose | None  # of V in shared memory
    producer: Beside | None  # what it takes meanwhile
    all_begin: bool  # as of Simulation
    result: Result

    @property
    def cycles(self) -> float:
        """Per iteration of the CTA tile: those of the simulation, or the bound of memory."""
        return max(self.result.cycles, *self._floors)

    @property
    def tflops(self) -> float:
        """TFLOPs/s of a long sequence on all SMs."""
        return self._rate(self.result, self.settings.clock)

    @cached_property
    def sums(self) -> Sums:
        return Sums.of(self.traces, any(x.base in BULK_SUMS for x in self.report.program.code))

    @cached_property
    def loaded(self) -> int:
        """Bytes that TMA brings per iteration of the CTA tile."""
        if self.transpose and self.transpose.widens:
            return kv_bytes(self.traces[0]) // 2
        return bytes_loaded(self.traces, loaded_per_step(self.report.program), self.sums)

    @cached_property
    def traffic(self) -> Traffic:
        machine = self.settings.machine
        return Traffic.of(self.traces, self.producer, machine, self.sums, self.loaded)

    @property
    def sums_floor(self) -> float:
        """Cycles in which L2 adds the sums of one iteration of the CTA tile."""
        return self.sums.total / self.settings.machine.l2_sums

    @property
    def _floors(self) -> tuple[float, float]:
        return self.traffic.total, self.sums_floor

    @property
    def tensor_floor(self) -> float:
        """Cycles of the matrix products alone, per iteration of the CTA tile."""
        mmas = [x for steps in self.traces for x in steps if x.is_mma]
        return sum(decode(x, self.settings.machine).busy for x in mmas)

    @property
    def mufu_floor(self) -> int:
        count = sum(x.base == "MUFU" for steps in self.traces for x in steps)
        return self.settings.machine.xu * count

    @property
    def issue_floor(self) -> int:
        return sum(map(len, self.traces)) + (len(self.producer.steps) if self.producer else 0)

    @property
    def loaded_per_cycle(self) -> float:
        return self.loaded / self.cycles

    @property
    def bound(self) -> str:
        """What limits the loop, in words."""
        if self.sums_floor > FULL * self.cycles:
            return "sums in L2"
        if self.traffic.total > FULL * self.cycles:
            return "shared memory"
        if self.result.stalls.get("sums in L2", 0) > WAITED:
            return "sums in L2, which warps wait for"
        return bound(self.result.busy)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.report.warnings

    def rivals(self) -> list[float]:
        """TFLOPs/s with each of the constants that fit the calibration set as well."""
        rates = []
        for steal, slow, clock in RIVALS:
            machine = replace(self.settings.machine, steal=steal, slow=slow)
            changed = replace(self.settings, machine=machine)
            result = _simulate(self.traces, changed, self.producer, self.all_begin)
            rates.append(self._rate(result, clock))
        return rates

    def _rate(self, result: Result, clock: float) -> float:
        slower = max(1.0, *(floor / result.cycles for floor in self._floors))
        return tflops(result, clock, self.settings.tail) / slower


def predict(
    cubin: bytes, kernel: str | None = None, settings: Settings | None = None
) -> Prediction:
    """Raises ValueError when the kernel has no loop with both matrix products and exponentials."""
    return predict_report(analyse(cubin, kernel), settings or Settings())


def predict_report(report: Report, settings: Settings) -> Prediction:
    """`predict` for a kernel that was read already."""
    traces = traces_of(report, settings)
    found = transpose(report.program)
    producer = None
    if found and settings.transposers:
        made = (kv_bytes if found.widens else v_bytes)(traces[0])
        steps = found.share(made, settings.transposers)
        producer = Beside(steps, settings.transposers, settings.ahead)
    free = all_begin(Flow(report.program), report.steady)
    result = _simulate(traces, settings, producer, free)
    return Prediction(report, settings, traces, found, producer, free, result)


def _simulate(
    traces: list[Trace], settings: Settings, producer: Beside | None, free: bool
) -> Result:
    """free: as all_begin of Simulation."""
    result = simulate(traces, settings.machine, settings.iterations, producer, free)
    return result if settings.flops is None else replace(result, flops=settings.flops)


def traces_of(report: Report, settings: Settings) -> list[Trace]:
    loop = report.steady
    if loop is not None and settings.rescale_always:
        loop = loop.around or loop
    if loop is None:
        raise ValueError(f"{report.resources.name} has no attention main loop")
    count = settings.consumers or max(1, report.resources.threads // 128 - 1)
    loops = [loop] * count
    if len(parts := _parts(report)) == count:
        loops = parts
    elif len(report.beside) == count - 1:
        loops = [loop, *report.beside]
    traces = []
    for warp, loop in enumerate(loops):
        steps = trace(report.program, loop, warp, settings.rescale_always)
        for edit in settings.edits:
            steps = edit(steps)
        traces.append(steps)
    return traces


def all_begin(flow: Flow, loop: MainLoop) -> bool:
    """Every warpgroup passes on a turn ahead of its loop, where in a ping-pong only one does."""
    header = flow.block_of(loop.head)
    return any(
        flow.dominates(flow.block_of(i), header)
        for i, x in enumerate(flow.program.code[: loop.head])
        if x.opcode.startswith("BAR.ARV") and is_ring(x) and not x.predicate
    )


def _parts(report: Report) -> list[MainLoop]:
    """The steady loops of warpgroups that multiply unequal parts for equally many scores."""
    found: dict[tuple[int, int], MainLoop] = {}
    for loop in report.loops:  # those with the fewest slots first
        flops = sum(prod(x.mma_shape) for i in loop.path if (x := report.program.code[i]).is_mma)
        found.setdefault((loop.straight.exponentials, flops), loop)
    alike = {exponentials for exponentials, _ in found}
    return sorted(found.values(), key=lambda loop: loop.head) if len(alike) == 1 else []


def bound(busy: dict[str, float]) -> str:
    tensor = busy["tensor"] + busy["stolen"]
    if tensor > FULL:
        lost = busy["stolen"] / tensor
        return f"tensor core ({lost:.0%} of its time lost to register and shared-memory contention)"
    names = {
        "xu": "MUFU",
        "alu": "ALU",
        "fma": "FMA",
        "lsu": "shared memory",
        "sums": "sums in L2",
        "issue": "issue slots",
    }
    unit = max(names, key=lambda name: busy[name])
    return names[unit] if busy[unit] > 0.85 else "latency and barriers: no unit is full"


def tflops(result: Result, clock: float, tail: float) -> float:
    """TFLOPs/s of all SMs at `clock` GHz."""
    return SMS * result.flops / result.cycles * clock / 1e3 * tail
