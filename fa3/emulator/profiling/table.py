"""A launch profile as text: a column per role."""

from __future__ import annotations

from collections.abc import Callable

from .classes import CLASSES
from .counters import WAITS, Counters

_BYTES = {
    "bulk_loaded": "bulk loads to shared memory",
    "bulk_read": "  read from global memory",
    "bulk_stored": "bulk stores from shared memory",
    "bulk_written": "  written to global memory",
    "cp_async": "cp.async",
    "loaded": "ld from global memory",
    "stored": "st to global memory",
    "summed": "added to global memory",
    "operands": "read from shared memory by wgmma",
}
_NAME, _COLUMN = 34, 14


def lines(launch) -> list[str]:
    columns = launch.counters
    return [
        f"grid {launch.grid}, block {launch.block}",
        _line("", list(columns)),
        *(_line(name, [f(c) for c in columns.values()]) for name, f in _rows(launch.total)),
        *(f"  {n:,} conflicts at {place}" for place, n in launch.conflicts.items()),
        f"{launch.cycles:,.0f} nominal cycles, {launch.longest_chain} hand-overs in the longest "
        "chain of waits",
        f"what the last warp waited for: {_path(launch)}",
    ]


def _rows(total: Counters) -> list[tuple[str, Callable[[Counters], str]]]:
    """(name, Counters -> text) of what occurs."""
    rows = [("warps of a CTA", lambda c: f"{c.warps}")]
    rows += [
        (f"{name} instructions", lambda c, n=name: f"{c.instructions.get(n, 0):,}")
        for name in CLASSES
        if total.instructions.get(name)
    ]
    rows.append(("exponentials", lambda c: f"{c.exponentials:,}"))
    rows.append(("MMAs", lambda c: f"{c.mmas:,}"))
    rows.append(("MMA FLOPs", lambda c: f"{c.flops:,}"))
    for field, name in _BYTES.items():
        if getattr(total.bytes, field):
            rows.append((f"bytes: {name}", lambda c, f=field: f"{getattr(c.bytes, f):,}"))
    for kind in total.shared:
        rows.append((f"{kind} wavefronts (conflicts)", lambda c, k=kind: _wavefronts(c, k)))
    for kind in WAITS:
        if kind in total.waits:
            rows.append((f"waits: {kind} (blocked)", lambda c, k=kind: _waits(c, k)))
    return rows


def _wavefronts(c: Counters, kind: str) -> str:
    found = c.shared.get(kind)
    return f"{found.wavefronts:,} ({found.conflicts:,})" if found else "0"


def _waits(c: Counters, kind: str) -> str:
    found = c.waits.get(kind)
    return f"{found.executed:,} ({found.blocked:,})" if found else "0"


def _line(name: str, cells: list[str]) -> str:
    return f"  {name:{_NAME}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _path(launch) -> str:
    path = sorted(launch.critical_path.items(), key=lambda x: -x[1])
    return ", ".join(f"{kind} {cycles / launch.cycles:.0%}" for kind, cycles in path if cycles)
