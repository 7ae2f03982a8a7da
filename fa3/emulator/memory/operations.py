"""Asynchronous operations: what they touch, and when they are carried out."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import KernelError


class Operation:
    """A copy of the async proxy, a cp.async or a group of wgmmas, from its issue to its completion.

    spans: (shared memory, first byte, byte after the last, whether they are written).
    """

    __slots__ = (
        "w",
        "site",
        "mask",
        "what",
        "spans",
        "queue",
        "issued",
        "completed",
        "clock",
        "lanes",
        "wrote",
        "_work",
    )

    def __init__(self, w, site: int, mask, what: str, spans, work: Callable[[], None], clock=None):
        """site: pc of the instruction.  mask: its lanes.  clock: what waiting for it tells."""
        self.clock = clock
        self.w, self.site, self.mask, self.what, self.spans = w, site, mask, what, spans
        self.lanes: list[int] = []  # that issued it, where several did
        self.wrote = None  # as threads write: addresses, bytes at each, threads
        self.queue: list[Operation] | None = None  # operations that complete in this order
        self.completed: int | None = None  # both in events of the launch
        self.issued = w.launch.tick()
        self._work = work
        if w.launch.schedule.trace is not None:
            w.launch.schedule.trace.append(self)

    @property
    def done(self) -> bool:
        return self.completed is not None

    def complete(self) -> None:
        """Carry it out, once; errors name the instruction that issued it."""
        if self.done:
            return
        self.completed = self.w.launch.tick()
        try:
            self._work()
        except KernelError as error:
            error.site = self.site
            raise

    def next(self) -> Operation:
        """The one that has to complete first: itself, or the oldest of its queue."""
        return next((o for o in self.queue or () if not o.done), self)

    def conflict(self, other: Operation) -> tuple[int, int] | None:
        """Bytes that both touch while both are in flight, and one of them writes."""
        for memory, low, high, writes in self.spans:
            for its_memory, its_low, its_high, it_writes in other.spans:
                shared = max(low, its_low), min(high, its_high)
                if memory is its_memory and (writes or it_writes) and shared[0] < shared[1]:
                    return shared if self._overlaps(other) else None
        return None

    def _overlaps(self, other: Operation) -> bool:
        forever = float("inf")
        ends = [forever if o.completed is None else o.completed for o in (self, other)]
        return self.issued < ends[1] and other.issued < ends[0]
