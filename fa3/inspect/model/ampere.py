"""The bound of a kernel for Ampere or Ada: what its steady loop asks of each unit of an SM.

No simulation: no latency, no barrier, no wait.  The busiest unit's time is the least that a step
can take.  Each of an SM's four sub-partitions runs the same instructions, of one warp of each side
in a backward pass, and a quarter of shared memory is its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ..flow import Flow
from ..loops import MainLoop, loops_beside
from ..report import Report
from ..sass import Instruction, Program

LANES = 32
MUFU = 8  # cycles of an instruction
SHARED_BYTES = 32  # of a sub-partition per cycle
CHUNKS = ("LDSM", "LDGSTS")  # 16 bytes per lane


@dataclass(frozen=True)
class Gpu:
    name: str
    sms: int
    clock: float  # GHz, boost
    mma: int  # cycles of an m16n8k16 product of 16-bit elements with fp32 sums


# By compute capability; GeForce cards of 8.6 take twice as long for a product as these.
GPUS = {
    (8, 0): Gpu("an A100", 108, 1.41, 8),
    (8, 6): Gpu("an A10", 72, 1.695, 16),
    (8, 9): Gpu("an L40S", 142, 2.52, 16),
}
# FlashAttention-2 on an A100: 73 % of the peak forward and 63 % backward at best, about 60 and 53 %
# at head dim 64; by this count its loops are bound at 100 % and 97 to 100 %.
REACHED = "0.6 to 0.73"
REACHED_BACKWARD = "0.55 to 0.65"


@dataclass(frozen=True)
class Bound:
    """Of one step of each kind of warp that a sub-partition runs, in its cycles."""

    gpu: Gpu
    steps: tuple[Instruction, ...]
    is_backward: bool

    @staticmethod
    def of(report: Report, capability: tuple[int, int], is_backward: bool) -> "Bound":
        """Raises ValueError where there is no loop with matrix products and exponentials."""
        if report.steady is None:
            raise ValueError("no loop holds both matrix products and exponentials")
        loops = [report.steady]
        if is_backward:
            loops += loops_beside(Flow(report.program))
        steps = (x for loop in loops for x in _steps(report.program, loop))
        return Bound(GPUS[capability], tuple(steps), is_backward)

    @cached_property
    def floors(self) -> dict[str, int]:
        """Cycles per step of each unit."""
        steps = self.steps
        return {
            "tensor cores": self.gpu.mma * sum(x.is_mma for x in steps),
            "shared memory": sum(map(_shared_bytes, steps)) // SHARED_BYTES,
            "exponentials": MUFU * sum(x.base == "MUFU" for x in steps),
            "issue": sum(x.base != "NOP" for x in steps),
        }

    @property
    def bound(self) -> str:
        """The busiest unit."""
        return max(self.floors, key=self.floors.get)

    @property
    def tflops(self) -> float:
        """TFLOPs/s at most, on a long sequence."""
        m, n, k = next(x.mma_shape for x in self.steps if x.is_mma)
        flops = 2 * m * n * k * sum(x.is_mma for x in self.steps)
        per_cycle = 4 * self.gpu.sms * flops / max(self.floors.values())
        return per_cycle * self.gpu.clock / 1000

    def lines(self) -> list[str]:
        """In the form of `fa3 inspect`."""
        floors = ", ".join(f"{name} {cycles}" for name, cycles in self.floors.items())
        reached = REACHED_BACKWARD if self.is_backward else REACHED
        return [
            f"predicted         at most {self.tflops:.0f} TFLOPs/s of {self.gpu.name} on long "
            f"sequences, if nothing but the busiest unit counts; FlashAttention-2 comes to "
            f"{reached} of such a bound on an A100",
            f"  bound           {self.bound}",
            f"  floors          cycles of a sub-partition per step: {floors}",
        ]

    def as_dict(self) -> dict:
        """For JSON."""
        return {"at_most_tflops": self.tflops, "bound": self.bound, "floors": self.floors}


def _steps(program: Program, loop: MainLoop) -> Iterable[Instruction]:
    """The straight way, and the copies that it leaves out in the last step."""
    way = set(loop.path)
    for i in range(loop.head, loop.latch + 1):
        step = program.code[i]
        if i in way or step.base == "LDGSTS":
            yield step


def _shared_bytes(step: Instruction) -> int:
    """That a warp moves through shared memory."""
    if step.predicate == "@!PT":  # never: it only holds a place
        return 0
    if step.base in CHUNKS:
        return 16 * LANES
    return step.bytes * LANES if step.base in ("LDS", "STS") else 0
