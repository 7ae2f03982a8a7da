"""Cubin -> Prediction."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fa3.inspect import Report, analyse

from .machine import CLOCK, RIVALS, SMS, TAIL, Machine
from .ops import decode
from .simulate import ITERATIONS, Result, kv_bytes, simulate
from .trace import Trace, trace

Edit = Callable[[Trace], Trace]


@dataclass(frozen=True)
class Settings:
    """What a prediction assumes beyond the kernel."""

    machine: Machine = Machine()
    clock: float = CLOCK  # GHz
    tail: float = TAIL
    iterations: int = ITERATIONS
    consumers: int | None = None  # warpgroups; None: all of the launch but one
    rescale_always: bool = False  # run what the steady state jumps over or leaves out, see trace
    edits: tuple[Edit, ...] = ()  # what-ifs, applied to each warp's trace in turn


@dataclass(frozen=True)
class Prediction:
    report: Report
    settings: Settings
    traces: list[Trace]  # one steady iteration of each consumer warpgroup
    result: Result

    @property
    def tflops(self) -> float:
        """TFLOPs/s of a long sequence on all SMs."""
        return tflops(self.result, self.settings.clock, self.settings.tail)

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
        return sum(map(len, self.traces))

    @property
    def kv_bytes_per_cycle(self) -> float:
        return kv_bytes(self.traces[0]) / self.result.cycles

    @property
    def bound(self) -> str:
        """What limits the loop, in words."""
        return bound(self.result.busy)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.report.warnings

    def rivals(self) -> list[float]:
        """TFLOPs/s with each of the constants that fit the calibration set as well."""
        rates = []
        for steal, slow, clock in RIVALS:
            machine = replace(self.settings.machine, steal=steal, slow=slow)
            result = simulate(self.traces, machine, self.settings.iterations)
            rates.append(tflops(result, clock, self.settings.tail))
        return rates


def predict(
    cubin: bytes, kernel: str | None = None, settings: Settings | None = None
) -> Prediction:
    """Raises ValueError when the kernel has no loop with both matrix products and exponentials."""
    settings = settings or Settings()
    report = analyse(cubin, kernel)
    traces = traces_of(report, settings)
    return Prediction(
        report, settings, traces, simulate(traces, settings.machine, settings.iterations)
    )


def traces_of(report: Report, settings: Settings) -> list[Trace]:
    loop = report.steady
    if loop is not None and settings.rescale_always:
        loop = loop.around or loop
    if loop is None:
        raise ValueError(f"{report.resources.name} has no attention main loop")
    count = settings.consumers or max(1, report.resources.threads // 128 - 1)
    traces = []
    for warp in range(count):
        steps = trace(report.program, loop, warp, settings.rescale_always)
        for edit in settings.edits:
            steps = edit(steps)
        traces.append(steps)
    return traces


def bound(busy: dict[str, float]) -> str:
    tensor = busy["tensor"] + busy["stolen"]
    if tensor > 0.95:
        lost = busy["stolen"] / tensor
        return f"tensor core ({lost:.0%} of its time lost to register and shared-memory contention)"
    names = {
        "xu": "MUFU",
        "alu": "ALU",
        "fma": "FMA",
        "lsu": "shared memory",
        "issue": "issue slots",
    }
    unit = max(names, key=lambda name: busy[name])
    return names[unit] if busy[unit] > 0.85 else "latency and barriers: no unit is full"


def tflops(result: Result, clock: float, tail: float) -> float:
    """TFLOPs/s of all SMs at `clock` GHz."""
    return SMS * result.flops / result.cycles * clock / 1e3 * tail
