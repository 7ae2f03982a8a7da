"""One launch: the grid cut into clusters, which run one after another (but see processes.py)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from ..checks import Checks
from ..errors import KernelError
from ..global_races import GlobalRaces
from ..lowering import Form, lower
from ..memory.regions import GlobalMemory
from ..numerics import blas
from ..profiling import Profile
from ..ptx import Kernel
from ..settings import Schedule
from . import processes
from .banks import Banks
from .cluster import Cluster

MAX_SMEM = 232_448  # bytes a CTA may have on compute capability 9.0

Dim3 = tuple[int, int, int]


@dataclasses.dataclass
class Launch:
    kernel: Kernel
    grid: Dim3
    block: Dim3
    cluster: Dim3
    dynamic_smem: int  # bytes
    params: np.ndarray  # the parameter bytes, packed as kernel.params says
    memory: GlobalMemory
    checks: Checks
    instruction_limit: int
    sms: int = 132
    schedule: Schedule | None = None  # None: late if that check is on, else eager
    accumulator: str = "fp32"
    record: Profile | None = None  # gets the profile of the launch
    processes: int | None = 1  # None: as many as pay
    progress: Callable[[int, int], None] | None = None  # told of clusters: done, of how many

    def __post_init__(self):
        self.threads = self.block[0] * self.block[1] * self.block[2]
        self.smem_bytes = self.kernel.static_smem + self.dynamic_smem
        self.tensor_maps: dict = {}
        self._banks: dict[tuple[int, int], Banks] = {}
        self.events = 0  # issues and completions of asynchronous operations
        self.ticks = 0  # of %clock and %globaltimer
        if self.schedule is None:
            self.schedule = Schedule("late" if self.checks.late else "eager")
        self._validate()
        tracked = self.checks.wgmma or self.checks.fence
        self.profile = self.record and self.record.start(self)
        form = Form(
            tracked=tracked,
            fine=self.schedule.kind == "random",
            watch=self.checks.uninit,
            profiled=self.profile is not None,
        )
        self.lowered = lower(self.kernel, form)
        self.observe(GlobalRaces(self) if self.checks.across else None)

    def _validate(self) -> None:
        if any(d % c for d, c in zip(self.grid, self.cluster, strict=True)):
            raise KernelError(f"grid {self.grid} is not a multiple of the cluster {self.cluster}")
        required = self.kernel.directives.get("reqntid")
        if required and (*required, 1, 1)[:3] != self.block:
            raise KernelError(f"launched with block {self.block}, compiled for {required}")
        if not 1 <= self.threads <= 1024:
            raise KernelError(f"{self.threads} threads per CTA; 1 to 1024 are possible")
        if self.smem_bytes > MAX_SMEM:
            raise KernelError(
                f"{self.smem_bytes} bytes of shared memory requested, {MAX_SMEM} available"
            )

    def banks(self, rank: int, index: int, lanes: int) -> Banks:
        """Registers for a warpgroup of a cluster; that of the next cluster gets the same."""
        key = rank, index
        if key not in self._banks:
            self._banks[key] = Banks(self.kernel.counts, lanes)
        return self._banks[key]

    def tick(self) -> int:
        """The number of this event of asynchronous operations."""
        self.events += 1
        return self.events

    def observe(self, observer, reads: bool = True) -> None:
        """Tell an observer (memory/places.py) of accesses to global memory, or of writes alone."""
        self.read_observer = observer if reads else None
        self.write_observer = observer

    def run(self) -> dict:
        """Run every CTA; returns statistics."""
        constants = self.kernel.constants
        tokens = [self.memory.add(self.kernel.address(x), len(constants[x])) for x in constants]
        try:
            with np.errstate(all="ignore"), blas.one_thread():
                statistics = processes.run(self, list(self._clusters()))
        finally:
            for token in tokens:
                self.memory.remove(token)
        if self.profile is not None:
            self.profile.finish()
        return statistics

    def run_cluster(self, number: int, positions: list[Dim3]) -> dict[str, int]:
        """The CTAs at these positions; returns what it adds to the statistics."""
        cluster = Cluster(self, positions, number)
        cluster.run()
        return cluster.counts()

    def _clusters(self):
        """The CTA positions of each cluster, x fastest."""
        corners = (range(0, d, c) for d, c in zip(self.grid[::-1], self.cluster[::-1], strict=True))
        cx, cy, cz = self.cluster
        for z, y, x in itertools.product(*corners):
            yield [(x + i, y + j, z + k) for k in range(cz) for j in range(cy) for i in range(cx)]
