"""What one iteration moves through shared memory and adds up in L2: bounds that tiles decide."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from ..sass import Instruction
from .machine import Machine
from .ops import (
    LANES,
    SUB_PARTITIONS,
    a_bytes,
    decode,
    operand_bytes,
    starts_from_zero,
    summed_bytes,
)
from .producer import Beside
from .simulate import kv_bytes
from .trace import Trace


@dataclass(frozen=True)
class Sums:
    """Bytes of fp32 that one iteration of the CTA tile adds to global memory: dQ."""

    direct: int  # from registers, by RED
    bulk: int  # from shared memory, by copies that another warp issues

    @classmethod
    def of(cls, traces: list[Trace], has_bulk: bool) -> "Sums":
        """has_bulk: the kernel has such copies; what they move is made by the consumers.

        That is what products start from zero, less S and dP: as many numbers as exponentials each.
        """
        steps = [x for trace in traces for x in trace]
        direct = SUB_PARTITIONS * sum(summed_bytes(x) for x in steps if x.base in ("RED", "REDG"))
        return cls(direct, _dq_bytes(steps) if has_bulk else 0)

    @property
    def total(self) -> int:
        return self.direct + self.bulk


NO_SUMS = Sums(0, 0)


def bytes_loaded(traces: list[Trace], expected: int | None, sums: Sums) -> int:
    """Bytes that TMA brings for one iteration of the CTA tile.

    expected: what the producer's loop expects of it.  Beside dQ these are Q and dO, as many numbers
    each in half the width, and one or two per row: much more is that of several ways through that
    loop, and not believed.
    """
    if not sums.total:
        return kv_bytes(traces[0])
    return expected if expected and expected < 1.1 * sums.total else sums.total


def _dq_bytes(steps: Iterable[Instruction]) -> int:
    steps = list(steps)
    made = sum(x.mma_shape[0] * x.mma_shape[1] for x in steps if x.is_mma and starts_from_zero(x))
    scores = SUB_PARTITIONS * LANES * sum(x.is_exp2 for x in steps)
    return 4 * max(0, made - 2 * scores)


@dataclass(frozen=True)
class Traffic:
    """Cycles of shared memory per iteration of the CTA tile, each part as if it were alone."""

    a: float  # A operands of the matrix products: none where registers hold them
    b: float  # B operands; every warpgroup reads K and V for itself
    tma: float  # what arrives: K and V, or Q and dO
    transpose: float  # the producer reads and writes V, or widens K and V
    other: float  # loads and stores of the consumers
    sums: float  # dQ leaves by copies that add

    @classmethod
    def of(
        cls,
        traces: list[Trace],
        producer: Beside | None,
        machine: Machine,
        sums: Sums = NO_SUMS,
        loaded: int | None = None,
    ) -> "Traffic":
        """loaded: bytes that TMA brings, by default those of K and V."""
        mmas = [x for steps in traces for x in steps if x.is_mma]
        rest = [x for steps in traces for x in steps if not x.is_mma]
        rate = machine.smem_bytes
        return cls(
            a=sum(map(a_bytes, mmas)) / rate,
            b=sum(map(operand_bytes, mmas)) / rate,
            tma=(kv_bytes(traces[0]) if loaded is None else loaded) / rate,
            transpose=sum(op.smem for op in producer.ops(machine)) if producer else 0,
            other=sum(decode(x, machine).smem for x in rest),
            sums=sums.bulk / rate,
        )

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        return self.told("transpose of V")

    def told(self, beside: str) -> str:
        """The parts that there are; beside: what the producer does."""
        names = {
            **{"a": "A", "b": "B", "tma": "TMA", "transpose": beside, "other": "other"},
            "sums": "sums out",
        }
        parts = {name: getattr(self, field) for field, name in names.items()}
        return ", ".join(f"{name} {cycles:.0f}" for name, cycles in parts.items() if cycles)
