"""The events of a launch in nominal time."""

from __future__ import annotations

from dataclasses import dataclass

from ..ptx.model import Location
from .clock import Moment

KINDS = {
    "load": "bulk copies to shared memory, from their issue to their arrival",
    "store": "bulk copies from shared memory, until it is read",
    "mma": "groups of wgmmas on the tensor cores",
    "exponentials": "stretches of instructions with ex2",
    "instructions": "other stretches of instructions",
    "wait": "waits that blocked",
}
WORK = ("exponentials", "instructions", "wait")  # what warps do themselves: never two at a time


@dataclass
class Event:
    """Something that took time, in nominal cycles from the start of its CTA."""

    kind: str  # of KINDS
    name: str
    start: float
    end: float
    cta: int  # its number in the grid
    warps: tuple[int, ...]  # of the CTA, that did it or had it done
    place: Location | None  # in the kernel's Python source
    group: tuple = ()  # loads: equal for those that complete the same phase of an mbarrier


class Timeline:
    def __init__(self):
        self.events: list[Event] = []

    def work(self, kind: str, moment: Moment, cycles: float, at: tuple) -> None:
        """Instructions that take the next cycles; at: (CTA, warps, place)."""
        span, start = moment.span, moment.time
        moment.time += cycles
        if span is not None and span.kind == kind and span.end == start and span.warps == at[1]:
            span.end = moment.time
            return
        moment.span = Event(kind, kind, start, moment.time, *at)
        self.events.append(moment.span)

    def prolong(self, moment: Moment, cycles: float) -> None:
        """Instructions that are already noted take longer."""
        moment.time += cycles
        if moment.span is not None:
            moment.span.end = moment.time

    def note(self, *event, group: tuple = ()) -> None:
        """The fields of an Event."""
        self.events.append(Event(*event, group=group))
