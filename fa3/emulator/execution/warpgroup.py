"""A warpgroup: up to 128 lanes in lockstep, with their registers.

Generated code sees a register as a row of lanes, by class and interpretation:
    U/S/F  32-bit as unsigned/signed/float      D/Q/E  64-bit       H/J/G  16-bit
    P      predicates
and whole classes as arrays (registers, lanes): words, ints, floats, predicates.
"""

from __future__ import annotations

import functools

import numpy as np

from ..matrix.wgmma import Queue
from ..memory.groups import Groups
from ..numerics.formats import rows
from ..profiling.clock import Moment
from ..registers import WgmmaRegisters
from . import fragments
from .fragments import Fragment
from .special import SpecialRegisters

LANES = 128


@functools.lru_cache(4096)
def _warps(mask: bytes) -> tuple[int, ...]:
    """The warps, from 0, with a lane in a mask of one byte per lane."""
    return tuple(i // 32 for i in range(0, len(mask), 32) if any(mask[i : i + 32]))


class Warpgroup:
    def __init__(self, cta, index: int):
        self.cta, self.index = cta, index
        self.cluster, self.launch = cta.cluster, cta.cluster.launch
        self.checks, self.memory, self.params = (
            self.launch.checks,
            self.launch.memory,
            self.launch.params,
        )
        self.first_thread = LANES * index
        threads = min(LANES, self.launch.threads - self.first_thread)
        self.lanes = (threads + 31) // 32 * 32
        self._clear_registers()
        self.sp = SpecialRegisters(self)
        self.all = np.ones(self.lanes, bool)
        self.ones, self.zeros = b"\1" * self.lanes, b"\0" * self.lanes
        self.live = np.arange(self.lanes) < threads
        self.threads = np.arange(self.lanes) + self.first_thread + 1024 * cta.rank
        self.profile = self.cluster.profile
        moment = None if self.profile is None else Moment()
        self.fragments = [Fragment(0, self.live.copy(), moment)]
        self.current = self.fragments[0]
        self.instructions = self.segments = 0
        self.cluster_generation = np.zeros(self.lanes, np.int64)
        self.at_cluster_barrier = np.zeros(self.lanes, bool)  # arrived, not yet past the wait
        self.wgmma = Queue(self)
        tracked = self.checks.wgmma or self.checks.fence
        self.registers = WgmmaRegisters(self.checks) if tracked else None
        self.races = self.cluster.races
        self.groups_kept = self.launch.schedule.defers or self.races is not None
        self.bulk, self.cp_async = Groups(), Groups()  # by lane, by warp; empty unless kept

    def _clear_registers(self) -> None:
        banks = self.launch.banks(self.cta.rank, self.index, self.lanes)
        banks.clear(self.checks.poison)
        vars(self).update(banks.named)  # where generated code looks for them
        if (watch := self.launch.lowered.watch) is not None:
            self.defined = np.zeros((watch.count, self.lanes), np.uint8)

    @functools.cached_property
    def local(self) -> np.ndarray:
        """The bytes of each lane's local memory."""
        return np.zeros((self.lanes, -(-self.launch.kernel.local_bytes // 16) * 16), np.uint8)

    def active(self, row, m):
        """The values of the active lanes (a constant stays a row of one when all are active)."""
        if m is None:
            return row if len(row) == self.lanes else np.broadcast_to(row, (self.lanes,))
        return rows(row, self.lanes)[m]

    def lane_list(self, m) -> list[int]:
        return np.flatnonzero(self.live if m is None else m).tolist()

    @staticmethod
    def lane_value(row, lane: int) -> int:
        return int(row[lane] if len(row) > 1 else row[0])

    def warps(self, m) -> list[int]:
        """Numbers, in the CTA, of the warps with an active lane."""
        mask = self.live if m is None else m
        return [4 * self.index + warp for warp in _warps(mask.tobytes())]

    def clock(self, dtype):
        self.launch.ticks += 100
        return np.full(self.lanes, self.launch.ticks, np.uint64).astype(dtype)

    def run(self) -> bool:
        return fragments.run(self)
