"""A timeline as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open.

A process per CTA, a thread per track; one nominal cycle is shown as a nanosecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .tracks import Track, lanes, span_of, tracks


def write(launch, path: Path | str, labels: Mapping[str, str]) -> None:
    """labels: other names of events."""
    events = []
    for cta in sorted({e.cta for e in launch.events}):
        events.append(_name("process_name", f"CTA {cta}", cta))
        threads = [t for track in tracks(launch, cta) for t in _threads(track)]
        for number, (name, members) in enumerate(threads):
            events.append(_name("thread_name", name, cta, number))
            events.append(_meta("thread_sort_index", cta, number, sort_index=number))
            events += [_span(e, number, labels) for e in members]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


def _threads(track: Track) -> Iterator[tuple[str, list]]:
    """(name, events that do not overlap)"""
    groups = {track.name: track.events}
    if track.warps:  # fragments of some warps of a warpgroup run beside each other
        sets = dict.fromkeys(sorted((e.warps for e in track.events), key=lambda w: (-len(w), w)))
        groups = {
            f"{span_of(s)} ({track.kind})": [e for e in track.events if e.warps == s] for s in sets
        }
    for name, members in groups.items():
        for lane in lanes(members):
            yield name, lane


def _meta(what: str, cta: int, thread: int = 0, **arguments) -> dict:
    return {"ph": "M", "name": what, "pid": cta, "tid": thread, "args": arguments}


def _name(what: str, name: str, cta: int, thread: int = 0) -> dict:
    return _meta(what, cta, thread, name=name)


def _span(e, thread: int, labels: Mapping[str, str]) -> dict:
    name = f"wait: {e.name}" if e.kind == "wait" else labels.get(e.name, e.name)
    return {
        "ph": "X",
        "name": name,
        "cat": e.kind,
        "pid": e.cta,
        "tid": thread,
        "ts": e.start / 1000,
        "dur": (e.end - e.start) / 1000,
        "args": {"warps": span_of(e.warps), "source": str(e.place or "")},
    }
