"""What a profile notes while a cluster runs: counts, and the nominal time of each fragment.

run_fragment calls ran(); everything else is called by instruments.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from . import banks, clock
from .classes import Stretch, mma_flops
from .clock import Engine, Groups, Handover, Moment, Step
from .counters import Counters, Tally
from .timeline import Timeline

_WARP = 32


@dataclass
class Recording:
    """Of one launch."""

    kernel: object  # ptx.Kernel
    tally: Tally
    timeline: Timeline = field(default_factory=Timeline)
    stretches: dict = field(default_factory=dict)  # (pc, instructions) -> Stretch
    lanes: dict = field(default_factory=dict)  # mask as bytes -> active lanes by warp
    conflicts: dict[int, int] = field(default_factory=dict)  # pc -> wavefronts too many
    last: Step | None = None  # of the warp that exits last
    depth: int = 0

    def stretch(self, pc: int, length: int) -> Stretch:
        key = pc, length
        if key not in self.stretches:
            self.stretches[key] = Stretch.of(self.kernel.code[pc : pc + length])
        return self.stretches[key]

    def lanes_of(self, mask: bytes) -> tuple[int, ...]:
        if mask not in self.lanes:
            lanes = np.frombuffer(mask, bool).reshape(-1, _WARP).sum(1)
            self.lanes[mask] = tuple(lanes.tolist())
        return self.lanes[mask]


@dataclass
class _Meeting:
    """A named barrier that some have arrived at."""

    handover: Handover = field(default_factory=Handover)
    held: list = field(default_factory=list)  # (warpgroup, fragment, pc)


class Observer:
    """Of one cluster, whose CTAs have an SM each."""

    def __init__(self, recording: Recording, ctas: int):
        self.recording, self.tally = recording, recording.tally
        self.timeline = recording.timeline
        self.here = 0  # pc of the last instruction of the segment that runs
        self.tensor_cores = [Engine() for _ in range(ctas)]
        self.loads = [Engine() for _ in range(ctas)]
        self.stores = [Engine() for _ in range(ctas)]
        self.phases: dict = {}  # mbarrier -> phase -> Handover
        self.meetings: dict[tuple[int, int], _Meeting] = {}  # (CTA, named barrier)
        self.generations: dict[int, Handover] = {}  # of the cluster barrier
        self.groups = Groups()  # by (warpgroup, kind, lane or warp)
        self.issued: dict = {}  # warpgroup -> shapes of wgmmas not yet committed

    # who

    def _warps(self, w, m) -> tuple[int, ...]:
        lanes = self.recording.lanes_of((w.live if m is None else m).tobytes())
        return tuple(4 * w.index + i for i, n in enumerate(lanes) if n)

    def _agent(self, w, m) -> int:
        """Warps as bits."""
        return sum(1 << (_WARP * w.cta.rank + i) for i in self._warps(w, m))

    def _at(self, w, m) -> tuple:
        """CTA, warps and place of an event."""
        code = self.recording.kernel.code
        place = code[self.here].loc if self.here < len(code) else None
        return w.cta.number, self._warps(w, m), place

    def _counters(self, w, m) -> Counters:
        """Those of the first of the warps."""
        return self.tally.warps[self._warps(w, m)[0]]

    # instructions

    def ran(self, w, fr, pc: int, length: int) -> None:
        """A fragment is about to run a segment."""
        mask = fr.mask.tobytes()
        key = w.index, (pc, length), mask
        executed = self.tally.executed
        executed[key] = executed.get(key, 0) + 1
        self.recording.lanes_of(mask)
        self.here = pc + length - 1
        stretch = self.recording.stretch(pc, length)
        kind = "exponentials" if stretch.exponentials else "instructions"
        self.timeline.work(kind, fr.moment, stretch.cycles, self._at(w, fr.mask))

    def again(self, w, fr) -> None:
        """The last instruction of the segment has blocked and will be executed once more."""
        key = w.index, (self.here, 1), fr.mask.tobytes()
        self.recording.stretch(self.here, 1)
        executed = self.tally.executed
        executed[key] = executed.get(key, 0) - 1

    def shared_access(self, w, m, kind: str, addresses: np.ndarray, nbytes: int) -> None:
        """ld.shared, st.shared: addresses of all lanes."""
        active = (w.live if m is None else m).reshape(-1, _WARP)
        for warp, lanes in enumerate(addresses.reshape(-1, _WARP)):
            if active[warp].any():
                found = banks.of_warp(lanes, nbytes, active[warp])
                self._wavefronts(w, warp, kind, found)

    def matrix_access(self, w, kind: str, warps, rows: np.ndarray) -> None:
        """ldmatrix, stmatrix: addresses (warps, matrices, 8)."""
        for warp, addresses in zip(warps, rows, strict=True):
            self._wavefronts(w, warp, kind, banks.of_groups(addresses, 16))

    def _wavefronts(self, w, warp: int, kind: str, found: banks.Wavefronts) -> None:
        self.tally.warps[4 * w.index + warp].access(kind, found.taken, found.conflicts)
        self.timeline.prolong(w.current.moment, found.taken)
        if found.conflicts:
            pc, conflicts = w.launch.lowered.pc_here(), self.recording.conflicts
            conflicts[pc] = conflicts.get(pc, 0) + found.conflicts

    def count_bytes(self, w, m, kind: str, nbytes: int) -> None:
        """nbytes per lane; kind is a field of counters.Bytes."""
        lanes = self.recording.lanes_of((w.live if m is None else m).tobytes())
        for i, n in enumerate(lanes):
            self.moved(4 * w.index + i, **{kind: n * nbytes})

    def moved(self, warp: int, **numbers: int) -> None:
        counted = self.tally.warps[warp].bytes
        for kind, nbytes in numbers.items():
            setattr(counted, kind, getattr(counted, kind) + nbytes)

    # matrix products

    def mma(self, w, m, k: int) -> None:
        """mma.sync m16n8"""
        for warp in self._warps(w, m):
            self.tally.warps[warp].mmas += 1
            self.tally.warps[warp].flops += mma_flops(16, 8, k)

    def wgmma(self, w, shape, width: int) -> None:
        """width: bytes of an element of A and B."""
        counters = self._counters(w, None)
        rows = shape.n + (64 if shape.a_registers is None else 0)
        counters.bytes.operands += rows * shape.k * width
        counters.mmas += 1
        counters.flops += mma_flops(64, shape.n, shape.k)
        self.issued.setdefault(w, []).append(shape)

    def commit_wgmmas(self, w, cycles_of) -> None:
        """cycles_of: a wgmma's shape -> cycles on the tensor cores."""
        issued, moment = self.issued.pop(w, []), w.current.moment
        if issued:
            cycles = sum(map(cycles_of, issued))
            step = self.tensor_cores[w.cta.rank].work("tensor cores", moment, cycles)
            self.groups.add((w, "wgmma"), step)
            name = _product(issued)
            self.timeline.note("mma", name, step.start, step.end, *self._at(w, None))
        self.groups.commit((w, "wgmma"))

    # copies

    def load(self, w, warp: int, nbytes: int, barriers, name: str) -> None:
        """A copy to shared memory that completes bytes at mbarriers, once for each."""
        moment, mask = w.current.moment, np.arange(w.lanes) // _WARP == warp
        step = self.loads[w.cta.rank].work("loads", moment, nbytes / clock.COPY_BYTES)
        step = Step("load latency", step.end, step.end + clock.COPY_LATENCY, step)
        for barrier in barriers:
            self._phase(barrier).add(step, moment.depth)
        group = tuple((id(barrier), barrier.phase) for barrier in barriers)
        at = self._at(w, mask)
        self.timeline.note("load", name, moment.time, step.end, *at, group=group)

    def store(self, w, lane: int, nbytes: int) -> None:
        """A bulk copy from shared memory, over when that is read."""
        moment, mask = w.current.moment, np.arange(w.lanes) == lane
        step = self.stores[w.cta.rank].work("stores", moment, nbytes / clock.COPY_BYTES)
        self.groups.add((w, "bulk group", lane), step)
        self.timeline.note("store", "store", moment.time, step.end, *self._at(w, mask))

    def copy_by_lanes(self, w, warp: int, nbytes: int) -> None:
        """cp.async of a warp."""
        moment = w.current.moment
        step = self.loads[w.cta.rank].work("loads", moment, nbytes / clock.COPY_BYTES)
        step = Step("load latency", step.end, step.end + clock.COPY_LATENCY, step)
        self.groups.add((w, "cp.async group", warp), step)

    def wait_for_groups(self, w, m, kind: str, owners, keep: int) -> None:
        last = None
        for owner in owners:
            last = clock.later(last, self.groups.drain((w, kind, *owner), keep))
        self._wait(w, w.current, m, kind, last)

    # barriers

    def _phase(self, barrier) -> Handover:
        """What the phase of an mbarrier that is running will pass on."""
        phases = self.phases.setdefault(barrier, {})
        if barrier.phase not in phases:
            phases.pop(barrier.phase - 3, None)
            phases[barrier.phase] = Handover()
        return phases[barrier.phase]

    def arrive(self, w, m, barriers) -> None:
        """Warps arrive at mbarriers."""
        moment, agent = w.current.moment, self._agent(w, m)
        for barrier in barriers:
            self._phase(barrier).add(moment.cause(), moment.depth, agent)

    def passed_mbarrier(self, w, fr, barrier, phase: int) -> None:
        """A wait for the end of a phase is over."""
        handover = self.phases.get(barrier, {}).get(phase)
        self._take(w, fr, "mbarrier", handover)

    def meet(self, w, fr, number: int, waits: bool) -> None:
        """A fragment has arrived at a named barrier, which may be complete by now."""
        meeting = self.meetings[w.cta.rank, number]
        meeting.handover.add(fr.moment.cause(), fr.moment.depth, self._agent(w, fr.mask))
        if waits:
            meeting.held.append((w, fr, self.here))
        self.released(w.cta)

    def begin_meeting(self, cta, number: int) -> None:
        """Before an arrival."""
        if number not in cta.barriers:
            self.meetings[cta.rank, number] = _Meeting()

    def released(self, cta) -> None:
        """Whoever was held at a named barrier that is complete goes on."""
        done = [k for k in self.meetings if k[0] == cta.rank and k[1] not in cta.barriers]
        for key in done:
            meeting, here = self.meetings.pop(key), self.here
            for w, fr, self.here in meeting.held:
                self._take(w, fr, "named barrier", meeting.handover)
            self.here = here

    def arrive_at_cluster(self, w, m, generation: int) -> None:
        moment = w.current.moment
        handover = self.generations.setdefault(generation, Handover())
        handover.add(moment.cause(), moment.depth, self._agent(w, m))

    def passed_cluster(self, w, fr, generation: int) -> None:
        self._take(w, fr, "cluster barrier", self.generations.get(generation))

    def _take(self, w, fr, kind: str, handover: Handover | None) -> None:
        if handover is not None:
            depth = handover.depth(self._agent(w, fr.mask))
            fr.moment.depth = max(fr.moment.depth, depth)
        self._wait(w, fr, fr.mask, kind, handover and handover.cause)

    def _wait(self, w, fr, m, kind: str, cause: Step | None) -> None:
        """A fragment goes on at the end of a chain of causes, if that is later."""
        moment: Moment = fr.moment
        cycles = max(0, cause.end - moment.time) if cause is not None else 0
        for warp in self._warps(w, m):
            self.tally.warps[warp].wait(kind, cycles)
        if cycles:
            self.timeline.note("wait", kind, moment.time, cause.end, *self._at(w, m))
            moment.time, moment.step = cause.end, cause

    def left(self, w, fr) -> None:
        """Its threads have exited."""
        recording, moment = self.recording, fr.moment
        recording.last = clock.later(recording.last, moment.cause())
        recording.depth = max(recording.depth, moment.depth)
        self.released(w.cta)


def _product(shapes: list) -> str:
    """A group of wgmmas as one product, "64x128x64, A in shared memory"."""
    k = sum(s.k for s in shapes)
    if len({(s.n, s.a_registers is None) for s in shapes}) > 1:
        return f"{len(shapes)} wgmmas"
    source = "registers" if shapes[0].a_registers is not None else "shared memory"
    return f"64x{shapes[0].n}x{k}, A in {source}"


def wgmma_cycles(shape, width: int) -> float:
    """width: bytes of an element of A."""
    return mma_flops(64, shape.n, shape.k) / clock.MMA_FLOPS[width]


def clipped(box, coords) -> int:
    """Bytes of a tensor map's box at coords that lie inside of the tensor."""
    inside = (
        max(0, min(x + b, n) - max(x, 0)) for x, b, n in zip(coords, box.box, box.dims, strict=True)
    )
    return math.prod(inside) * box.width
