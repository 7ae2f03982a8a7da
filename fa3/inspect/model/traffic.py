"""What one iteration moves through shared memory, a bound that tiles and registers decide."""

from dataclasses import dataclass, fields

from .machine import Machine
from .ops import a_bytes, decode, operand_bytes
from .producer import Beside
from .simulate import kv_bytes
from .trace import Trace


@dataclass(frozen=True)
class Traffic:
    """Cycles of shared memory per iteration of the CTA tile, each part as if it were alone."""

    a: float  # A operands of the matrix products: none where registers hold them
    b: float  # B operands; every warpgroup reads K and V for itself
    tma: float  # K and V arrive
    transpose: float  # the producer reads and writes V
    other: float  # loads and stores of the consumers

    @classmethod
    def of(cls, traces: list[Trace], producer: Beside | None, machine: Machine) -> "Traffic":
        mmas = [x for steps in traces for x in steps if x.is_mma]
        rest = [x for steps in traces for x in steps if not x.is_mma]
        rate = machine.smem_bytes
        return cls(
            a=sum(map(a_bytes, mmas)) / rate,
            b=sum(map(operand_bytes, mmas)) / rate,
            tma=kv_bytes(traces[0]) / rate,
            transpose=sum(op.smem for op in producer.ops(machine)) if producer else 0,
            other=sum(decode(x, machine).smem for x in rest),
        )

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """The parts that there are."""
        names = {"a": "A", "b": "B", "tma": "TMA", "transpose": "transpose of V", "other": "other"}
        parts = {name: getattr(self, field) for field, name in names.items()}
        return ", ".join(f"{name} {cycles:.0f}" for name, cycles in parts.items() if cycles)
