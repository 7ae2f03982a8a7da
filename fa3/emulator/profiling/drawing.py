"""A timeline of one CTA as a picture; needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import SetupError
from .timeline import Event
from .tracks import Track, lanes, tracks

_COLOURS = {"exponentials": "#d1495b", "instructions": "#7d98a1", "wait": "#e4e8eb"}
_PRODUCTS = ("#1f6f8b", "#e09f3e", "#5e548e", "#40916c")
_LOADS = ("#90be6d", "#f4a261", "#8ecae6", "#cdb4db")
_WORDS = {"wait": "waiting", "instructions": "other instructions"}
_DPI, _INCHES = 110, 11.0
_HEIGHT = 0.8  # of what is drawn in a row of 1
_LETTER = 6.0  # pixels of a letter inside a span


@dataclass(frozen=True)
class View:
    """Which part of a launch is drawn, and under which names."""

    cta: int = 0
    start: float = 0
    end: float | None = None  # None: its end
    labels: Mapping[str, str] | None = None  # other names of events
    title: str = ""

    def label(self, name: str) -> str:
        return (self.labels or {}).get(name, name)


def write(launch, path: Path | str, view: View) -> None:
    """Rows from top to bottom: loads, stores, tensor cores, warps by warpgroup and role."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("drawing a timeline needs matplotlib: pip install matplotlib") from error
    found = tracks(launch, view.cta)
    end = view.end or max(e.end for t in found for e in t.events)
    shown = [_within(t, view.start, end) for t in found]
    shown = [t for t in shown if any(e.kind != "wait" for e in t.events)]
    colours = _colours(found)
    figure = Figure(figsize=(_INCHES, 0.9 + 0.45 * len(shown)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xlim(view.start, end)
    axis.set_ylim(len(shown), 0)
    axis.set_yticks([i + 0.5 for i in range(len(shown))], [t.name for t in shown], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(view.title, fontsize=9)
    axis.set_xlabel("nominal cycles", fontsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    for i, track in enumerate(shown):
        if track.warps:  # those whose lanes wait for the rest of their warps have no event
            _background(axis, track, i, colours["wait", ""])
        for e, low, high in _places(track):
            _span(axis, e, (i + low, i + high), colours, view)
    _legend(figure, shown, colours, view)
    figure.savefig(path, metadata={"Software": None})


def _within(track: Track, start: float, end: float) -> Track:
    events = [e for e in track.events if e.end > start and e.start < end]
    return Track(track.name, track.kind, events, track.warps)


def _colours(found_tracks: list[Track]) -> dict[tuple[str, str], str]:
    """(kind, name) of an event -> colour, by the order of the first of its name"""
    found = {(kind, ""): colour for kind, colour in _COLOURS.items()}
    for kind, palette in (("mma", _PRODUCTS), ("load", _LOADS)):
        events = [e for t in found_tracks for e in t.events if e.kind == kind]
        names = dict.fromkeys(e.name for e in sorted(events, key=lambda e: e.start))
        found.update({(kind, n): palette[i % len(palette)] for i, n in enumerate(names)})
    found["store", "store"] = "#b0a990"
    return found


def _key(e: Event) -> tuple[str, str]:
    return (e.kind, e.name) if e.kind in ("mma", "load", "store") else (e.kind, "")


def _places(track: Track) -> Iterator[tuple[Event, float, float]]:
    """Events with their lower and upper edge in a row of height 1."""
    low, height = (1 - _HEIGHT) / 2, _HEIGHT
    if track.warps:  # a warpgroup's warps have a part of the row each
        part = height / len(track.warps)
        for e in sorted(track.events, key=lambda e: -len(e.warps)):
            first, last = (track.warps.index(x) for x in (e.warps[0], e.warps[-1]))
            yield e, low + part * first, low + part * (last + 1)
        return
    beside = lanes(track.events)
    part = height / len(beside)
    for i, lane in enumerate(beside):
        for e in lane:
            yield e, low + part * i, low + part * (i + 1)


def _background(axis, track: Track, row: int, colour: str) -> None:
    start, end = track.events[0].start, max(e.end for e in track.events)
    axis.barh(row + 0.5, end - start, _HEIGHT, left=start, color=colour)


def _span(axis, e: Event, edges, colours, view: View) -> None:
    low, high = edges
    first, last = axis.get_xlim()
    separate = e.kind in ("mma", "load", "store")
    axis.barh(
        (low + high) / 2,
        e.end - e.start,
        high - low,
        left=e.start,
        color=colours[_key(e)],
        edgecolor="white" if separate else "none",
        linewidth=0.6 if separate else 0,
    )
    text = _text(e, view)
    begin, end = max(e.start, first), min(e.end, last)
    room = (end - begin) / (last - first) * _INCHES * _DPI * 0.85
    if text and room > _LETTER * len(text) and high - low > 0.25:
        axis.text(
            (begin + end) / 2,
            (low + high) / 2,
            text,
            ha="center",
            va="center",
            fontsize=7,
            color="white" if e.kind == "mma" else "black",
        )


def _text(e: Event, view: View) -> str:
    """What stands inside of a span: of products also whose they are."""
    if e.kind == "mma":
        return f"{e.warps[0] // 4}: {view.label(e.name)}"
    return view.label(e.name) if e.kind == "load" else ""


def _legend(figure, shown: list[Track], colours, view: View) -> None:
    from matplotlib.patches import Patch

    used = {_key(e) for t in shown for e in t.events}
    entries = [
        Patch(color=colour, label=_entry(key, view))
        for key, colour in colours.items()
        if key in used
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=7, fontsize=8, frameon=False)


def _entry(key: tuple[str, str], view: View) -> str:
    kind, name = key
    words = {"mma": "product", "load": "load of"}.get(kind)
    return f"{words} {view.label(name)}" if words else _WORDS.get(kind, kind)
