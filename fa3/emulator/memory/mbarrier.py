"""mbarriers: phases, pending arrivals, transaction bytes.

A phase completes when no arrival and no byte is pending; the transaction count may be negative for
a while (data before expect_tx).  try_wait.parity P passes iff the phase with parity P has
completed, that is, if the current one has the other parity: a fresh barrier passes P = 1.
"""

from __future__ import annotations

import numpy as np

from ..clocks import joined
from ..errors import BarrierMisuse, Misaligned, MissingProxyFence, OutOfBounds
from ..numerics.formats import rows
from .shared import OFFSET, shared_at

MAX_COUNT = 1 << 20


class MBarrier:
    __slots__ = (
        "count",
        "pending",
        "tx",
        "expected",
        "came",
        "phase",
        "clock",
        "arriving",
        "site",
        "waiting",
        "unfenced",
        "arrived",
        "boxes",
    )

    def __init__(self, count: int):
        self.count = self.pending = count
        self.tx = self.phase = 0  # bytes outstanding
        self.expected = self.came = 0  # bytes of this phase, for messages
        # what the last completed phase passes on, and the current one so far (check "race")
        self.clock = self.arriving = None
        # thread and pc of the initialisation, until a fence publishes it
        self.unfenced: tuple[int, int] | None = None
        self.site: int | None = None  # pc of the last that expected bytes
        self.waiting: dict = {}  # fragment -> phase it waits for the end of, warpgroup, pc
        self.boxes: dict = {}  # tensor map -> (coordinates, w, pc) while none was inside, else None
        self.arrived = [], []  # in the last phase and this one: (warpgroup, lanes)

    def settle(self) -> bool:
        """Complete the phase if nothing is outstanding."""
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count
            self.expected = self.came = 0
            self.clock, self.arriving = self.arriving, None
            self.arrived = self.arrived[1], []
            if self.boxes:
                self._require_inside()
            if self.waiting:
                self._require_observed()
            return True
        return False

    def note(self, box, coords, w, site: int) -> None:
        """A box of the current phase; a tile is several, of which the last may lie outside."""
        if box.overlaps(coords) or box.is_no_row(coords):
            self.boxes[box] = None
        else:
            self.boxes.setdefault(box, (coords, w, site))

    def _require_inside(self) -> None:
        """Of each tensor, a phase got something (check "box")."""
        boxes, self.boxes = self.boxes, {}
        for box, outside in boxes.items():
            if outside is not None:
                coords, w, site = outside
                error = OutOfBounds(
                    f"a TMA load of CTA {w.cta.position} brings zeros alone: in phase "
                    f"{self.phase - 1} of its mbarrier all boxes of the tensor lie outside of it, "
                    f"the first at {list(coords)} ({box})"
                )
                error.site = site
                raise error

    def _require_observed(self) -> None:
        """Whoever waited for the last phase but one must have gone on by now."""
        for fragment, (phase, w, pc) in list(self.waiting.items()):
            if fragment.pc != pc or fragment not in w.fragments:
                del self.waiting[fragment]
            elif phase < self.phase - 1:
                error = BarrierMisuse(
                    f"mbarrier completes phase {self.phase - 1} while a warp still waits for the "
                    f"end of phase {phase}, which it now takes for running: a phase was overrun"
                )
                error.site = pc
                raise error

    def passed(self, value: int, parity: bool) -> bool:
        """Whether a wait for a parity (or for the phase of a token) succeeds."""
        return (self.phase & 1) != (value & 1) if parity else self.phase > value

    def expect(self, nbytes: int) -> None:
        self.tx += nbytes
        self.expected += nbytes

    def receive(self, nbytes: int) -> None:
        self.tx -= nbytes
        self.came += nbytes

    @property
    def bytes(self) -> str:
        """Of this phase."""
        if not (self.expected or self.came):
            return "no bytes expected"
        return f"{self.expected} bytes expected, {self.came} came"

    def arrive(self, w, lanes, count: int) -> None:
        """Threads of a warpgroup arrive; the phase may be complete then."""
        now = self.arrived[1]
        if not now or now[-1][1] is not lanes:
            now.append((w, lanes))
        self.pending -= count
        self.settle()

    def __str__(self):
        return (
            f"phase {self.phase}, {self.pending} of {self.count} arrivals outstanding, {self.bytes}"
            f"{_arrivals('in it', self.arrived[1])}"
            f"{_arrivals('in the phase before', self.arrived[0])}"
        )


def _arrivals(when: str, arrived: list) -> str:
    """ "; arrived WHEN: warps [4, 5] of CTA (0, 0, 0)" """
    warps: dict[tuple, set] = {}
    for w, lanes in arrived:
        warps.setdefault(w.cta.position, set()).update(w.warps(lanes))
    text = ", ".join(f"warps {sorted(found)} of CTA {cta}" for cta, found in warps.items())
    return text and f"; arrived {when}: {text}"


def find(w, address: int) -> MBarrier:
    memory, offset = shared_at(w, address)
    barrier = memory.barriers.get(offset)
    if barrier is None:
        raise BarrierMisuse(
            f"operation on an mbarrier that was not initialised: shared address {offset:#x}"
        )
    return barrier


def complete(w, address: int, nbytes: int, clock=None) -> None:
    """nbytes of a transaction have arrived (negative: are expected), which passes a clock on."""
    barrier = find(w, address)
    if barrier.unfenced is not None and nbytes > 0:
        raise MissingProxyFence(
            f"the async proxy completes bytes at the mbarrier at {address & OFFSET:#x}, which "
            f"thread {barrier.unfenced[0] % 1024} initialised without a fence.mbarrier_init since "
            f"{w.launch.lowered.place(barrier.unfenced[1])}"
        )
    barrier.arriving = joined(barrier.arriving, clock)
    if nbytes < 0:
        barrier.expect(-nbytes)
    else:
        barrier.receive(nbytes)
    if abs(barrier.tx) >= MAX_COUNT:
        raise BarrierMisuse(f"mbarrier at {address & OFFSET:#x}: transaction count out of range")
    barrier.settle()
    w.cluster.events += 1


def init(w, m, address, offset, count):
    memory = w.cta.smem
    addresses = _addresses(w, m, address, offset)
    for at, n in zip(addresses, w.active(count, m).tolist(), strict=False):
        if at & 7:
            raise Misaligned(f"mbarrier at {at:#x} is not 8-byte aligned")
        if not 1 <= n < MAX_COUNT:
            raise BarrierMisuse(f"mbarrier.init at {at:#x} with count {n}")
        if w.checks.mbarrier and at in memory.barriers:
            raise BarrierMisuse(
                f"mbarrier at {at:#x} is initialised again without mbarrier.inval "
                f"({memory.barriers[at]})"
            )
        memory.barriers[at] = barrier = MBarrier(n)
        threads = w.threads[w.lane_list(m)[:1]]
        if w.checks.proxy:
            barrier.unfenced = int(threads[0]), w.launch.lowered.pc_here()
        if w.races is not None:
            w.races.generic(memory, np.array([at]), 8, threads, writes=True)
        if memory.written is not None:
            memory.written.words[[at >> 2, (at >> 2) + 1]] = True


def publish(w, m):
    """fence.mbarrier_init and fence.proxy.async: the async proxy sees what a thread initialised."""
    threads = w.threads[w.lane_list(m)]
    for barrier in w.cta.smem.barriers.values():
        if barrier.unfenced is not None and barrier.unfenced[0] in threads:
            barrier.unfenced = None


def fence_async(w, m):
    """fence.proxy.async by the active threads."""
    if w.checks.proxy:
        w.cluster.proxy.fence(w.threads if m is None else w.threads[m])
        publish(w, m)
        if w.races is not None:
            w.races.fence(w, m)


def invalidate(w, m, address, offset):
    for at in _addresses(w, m, address, offset):
        w.cta.smem.barriers.pop(at, None)


def transaction(w, m, address, offset, nbytes, sign):
    """mbarrier.complete_tx (sign 1) and mbarrier.expect_tx (sign -1)."""
    if sign > 0:
        pass_on(w, m, address, offset)
    for at, n in zip(_addresses(w, m, address, offset), w.active(nbytes, m).tolist(), strict=True):
        if sign < 0:
            find(w, at).site = w.current.pc
        complete(w, at, sign * n)


def arrive(w, m, row, address, offset, x, expect):
    """mbarrier.arrive [.expect_tx]: x is the arrival count, or with `expect` the bytes."""
    addresses = _addresses(w, m, address, offset)
    values = w.active(x, m).tolist() if x is not None else [1] * len(addresses)
    tokens, lanes = [], w.live if m is None else m
    pass_on(w, m, address, offset)
    for at, value in zip(addresses, values, strict=True):
        barrier = find(w, at)
        tokens.append(barrier.phase)
        arrivals = 1 if expect else value
        if expect:
            barrier.expect(value)
            barrier.site = w.launch.lowered.pc_here() if w.checks.mbarrier else None
        if arrivals > barrier.pending:
            raise BarrierMisuse(
                f"mbarrier at {at & OFFSET:#x}: more arrivals than its count of "
                f"{barrier.count} in one phase ({barrier})"
            )
        barrier.arrive(w, lanes, arrivals)
    w.cluster.events += 1
    if row is not None:
        row[slice(None) if m is None else m] = np.array(tokens, np.uint64)


def wait(w, fr, row, address, offset, x, how, pc, after):
    """mbarrier.try_wait / test_wait, which end a segment; how is (parity, blocking).

    try_wait suspends, and returns false only when nothing in the cluster can move (its time
    limit): CUTLASS peeks at the next stage before it releases the previous one.
    """
    parity, blocking = how
    a = w.active(address, fr.mask).astype(np.int64) + offset
    x = w.active(x, fr.mask)
    if a.size > 1 and ((a != a[0]).any() or (x != x[0]).any()):
        done = np.array(
            [
                find(w, int(p)).passed(int(v), parity)
                for p, v in zip(a, np.broadcast_to(x, a.shape), strict=True)
            ]
        )
    else:
        done = np.full(len(a), find(w, int(a[0])).passed(int(x[0]), parity))
    everyone = bool(done.all())
    if everyone or not blocking or fr.timed_out:
        if w.checks.mbarrier:
            find(w, int(a[0])).waiting.pop(fr, None)
        row[fr.mask] = done
        if w.races is not None:
            _observe(w, fr.mask, a, done)
        timed_out, fr.timed_out = fr.timed_out, False
        if everyone or timed_out:
            return after
        fr.pc = after
        fr.sleep()  # a failed poll lets others run
        return -1
    first = int(np.flatnonzero(~done)[0])
    at, value = int(a[first]), int(np.broadcast_to(x, a.shape)[first])
    barrier = find(w, at)
    fr.pc = pc
    if w.checks.mbarrier and parity:
        barrier.waiting.setdefault(fr, (barrier.phase, w, pc))
    fr.wait_until(
        lambda: barrier.passed(value, parity),
        lambda: f"mbarrier {at & OFFSET:#x} {'parity' if parity else 'token'} {value} ({barrier})",
    )
    return -1


def require_settled(memory) -> None:
    """At the end of a CTA: as many bytes arrived as were expected."""
    for at, barrier in memory.barriers.items():
        if barrier.tx:
            fewer = "fewer" if barrier.tx > 0 else "more"
            error = BarrierMisuse(
                f"mbarrier at {at:#x} ends with {abs(barrier.tx)} bytes {fewer} than expected "
                f"({barrier.bytes})"
            )
            error.site = barrier.site
            raise error


def pass_on(w, m, address, offset) -> None:
    """What the active warps know goes to whoever waits for the phase (check "race")."""
    if w.races is None:
        return
    addresses = rows(address, w.lanes)
    for agent, lanes in w.races.by_agent(w, np.flatnonzero(w.live if m is None else m)):
        clock = w.races.release([agent], w.threads[lanes])
        for at in set((addresses[lanes].astype(np.int64) + offset).tolist()):
            w.races.use_mbarrier(*shared_at(w, at), agent)
            barrier = find(w, at)
            barrier.arriving = joined(barrier.arriving, clock)


def _observe(w, mask, addresses, done) -> None:
    """The lanes whose wait succeeded learn what the phase passes on (check "race")."""
    lanes = np.flatnonzero(mask)
    addresses = np.broadcast_to(addresses, lanes.shape)
    for at in set(addresses[done].tolist()):
        mine = lanes[done & (addresses == at)]
        for agent, _ in w.races.by_agent(w, mine):
            w.races.use_mbarrier(*shared_at(w, at), agent)
        w.races.learn(w, mine, find(w, at).clock)


def _addresses(w, m, address, offset) -> list[int]:
    return (w.active(address, m).astype(np.int64) + offset).tolist()
