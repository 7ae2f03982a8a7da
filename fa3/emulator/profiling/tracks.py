"""The events of a CTA by what they occupy: copies, the tensor cores, warps of one role."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .timeline import WORK, Event


@dataclass
class Track:
    name: str
    kind: str  # "load", "store", "mma" or a role of warps
    events: list[Event]
    warps: tuple[int, ...] = ()  # of a role


def tracks(launch, cta: int) -> list[Track]:
    """Of a CTA by its number: copies, tensor cores, then warpgroup by warpgroup its roles."""
    events = [e for e in launch.events if e.cta == cta]
    if not events:
        raise ValueError(f"CTA {cta} has no events; the grid is {launch.grid}")
    units = (("loads", "load"), ("stores", "store"), ("tensor cores", "mma"))
    found = [Track(name, kind, [e for e in events if e.kind == kind]) for name, kind in units]
    found[0].events = _joined(found[0].events)
    for warps, role in _roles(launch):
        found.append(Track(f"{span_of(warps)} ({role})", role, _done_by(warps, events), warps))
    return [track for track in found if track.events]


def _roles(launch) -> list[tuple[tuple[int, ...], str]]:
    """Warps of one warpgroup and role."""
    found: dict[tuple[int, str], list[int]] = {}
    for warp, counters in enumerate(launch.warps):
        found.setdefault((warp // 4, counters.role), []).append(warp)
    return [(tuple(warps), role) for (_, role), warps in found.items()]


def _done_by(warps: tuple[int, ...], events: list[Event]) -> list[Event]:
    """What these warps did themselves, without the others that did it with them."""
    shares = ((e, tuple(w for w in e.warps if w in warps)) for e in events if e.kind in WORK)
    return [e if own == e.warps else replace(e, warps=own) for e, own in shares if own]


def span_of(warps: Iterable[int]) -> str:
    """ "warps 4-7" """
    warps = tuple(warps)
    if len(warps) == 1:
        return f"warp {warps[0]}"
    if warps[-1] - warps[0] == len(warps) - 1:
        return f"warps {warps[0]}-{warps[-1]}"
    return f"warps {', '.join(map(str, warps))}"


def _joined(loads: list[Event]) -> list[Event]:
    """One event for the loads of a tensor that complete one phase of an mbarrier."""
    found: dict[tuple, Event] = {}
    for e in loads:
        key = e.group, e.name
        if key in found:
            first = found[key]
            e = replace(e, start=min(first.start, e.start), end=max(first.end, e.end))
        found[key] = e
    return list(found.values())


def lanes(events: Iterable[Event]) -> list[list[Event]]:
    """Events that overlap in different lists, as few as possible."""
    found: list[list[Event]] = []
    for e in sorted(events, key=lambda e: e.start):
        free = next((lane for lane in found if lane[-1].end <= e.start), None)
        if free is None:
            found.append(free := [])
        free.append(e)
    return found
