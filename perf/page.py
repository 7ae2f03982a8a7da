"""docs/performance.md: what the committed CSV files say, and nothing else."""

import statistics
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from . import bandwidth
from .backends import OURS, OWN
from .cases import PASSES
from .charts import write_chart
from .results import ROOT, Machine, Measured, Run, newest, panels, ratios, speeds

PAGE = ROOT / "docs" / "performance.md"
NOT_MEASURED = "Not measured."
BF16 = "fa3-bf16"
INTRODUCTION = """\
# Performance

Written by `python -m perf.report` from the CSV files in `perf/results`, of each pass the newest run
on one GPU; every figure here stands in one of them. The setting is that of the FlashAttention-3
paper: 16k tokens in all, hidden size 2048, 4 * length² * head dim operations per head, half of them
if causal, of gradients 2.5 times as many and with the forward pass 3.5 times.
[device.md](device.md) says how a run is made, [evidence.md](evidence.md) what is known without one.
"""


def write(path: Path, measured: list[Measured], moved: list) -> list[Path]:
    """The page, and a chart per measured pass beside it; returns what was written."""
    written = [path]
    for of_pass in PASSES:
        if run := newest(measured, of_pass):
            chart = path.parent / _chart_name(of_pass)
            write_chart(chart, run.rows, run.machine)
            written.append(chart)
    path.write_text(text(measured, moved))
    return written


def text(measured: Iterable[Measured], moved: list) -> str:
    """The page's markdown."""
    measured = list(measured)
    parts = [INTRODUCTION]
    for of_pass in PASSES:
        run = newest(measured, of_pass)
        body = _of_run(of_pass, run) if run else NOT_MEASURED
        parts.append(f"## {_title(of_pass)}\n\n{body}\n")
    parts.append(f"## {bandwidth.STEM}_fp8\n\n{_of_moved(moved)}\n")
    return "\n".join(parts)


def _title(of_pass: str) -> str:
    return (of_pass[0].upper() + of_pass[1:]).replace("fp8", "FP8")


def _chart_name(of_pass: str) -> str:
    return f"performance-{of_pass.replace(' ', '-')}.png"


def _where(machine: Machine) -> str:
    m = machine
    return (
        f"{m.device}, driver {m.driver}, torch {m.torch}, CuTe DSL {m.dsl}, commit {m.commit}, "
        f"{m.date}"
    )


def _of_run(of_pass: str, run: Run) -> str:
    clocks = sorted({row.sm_mhz for row in run.rows if row.sm_mhz is not None})
    under_load = f"; SM clock under load {clocks[0]} to {clocks[-1]} MHz" if clocks else ""
    parts = [
        f"{_where(run.machine)}{under_load}.",
        f"![TFLOPs/s by length]({_chart_name(of_pass)})",
    ]
    found = ratios(run.rows)
    if found:
        mean, ahead = statistics.geometric_mean(found.values()), sum(x >= 1 for x in found.values())
        parts.append(
            f"Over the best peer of each row: geometric mean {mean:.2f}, worst "
            f"{min(found.values()):.2f}, ahead in {ahead} of {len(found)} rows."
        )
    parts += [_panel(panel) for panel in panels(run.rows)]
    parts += filter(None, (_behind(run), _slower_than_bf16(run), _without_a_time(run)))
    return "\n\n".join(parts)


def _panel(panel: list) -> str:
    lines = [
        f"### {panel[0].title}",
        "",
        _cells("length", "ours", "best peer", "which", "ratio", "matrix product", "of it"),
        _cells(*["---"] * 7),
    ]
    for length, group in groupby(panel, key=lambda row: row.length):
        rows = {row.backend: row for row in group}
        speed = {name: row.tflops for name, row in rows.items() if row.tflops is not None}
        ours, peers = speed.get(OURS), {n: x for n, x in speed.items() if n not in OWN}
        best = max(peers, key=peers.get, default=None)
        ceiling = next((r.matmul_tflops for r in rows.values() if r.matmul_tflops), None)
        both = ours is not None and best is not None
        lines.append(
            _cells(
                str(length),
                _figure(ours),
                _figure(peers.get(best)),
                best or "-",
                f"{ours / peers[best]:.2f}" if both else "-",
                _figure(ceiling),
                f"{ours / ceiling:.0%}" if ours is not None and ceiling else "-",
            )
        )
    return "\n".join(lines)


def _behind(run: Run) -> str:
    found = sorted((ratio, case) for case, ratio in ratios(run.rows).items() if ratio < 1)
    if not found:
        return ""
    rows = ", ".join(f"{_name(case)} ({ratio:.2f})" for ratio, case in found)
    return f"Behind the best peer: {rows}."


def _slower_than_bf16(run: Run) -> str:
    found = [
        f"{_name(case)} ({speed[OURS] / speed[BF16]:.2f})"
        for case, speed in speeds(run.rows).items()
        if {OURS, BF16} <= set(speed) and speed[OURS] < speed[BF16]
    ]
    return f"Slower than our own bf16 kernel: {', '.join(found)}." if found else ""


def _without_a_time(run: Run) -> str:
    found = dict.fromkeys(f"{row.backend}: {row.note}" for row in run.rows if row.note)
    return "\n".join(["Without a time:", "", *(f"- {reason}" for reason in found)]) if found else ""


def _name(case: tuple) -> str:
    dtype, head_dim, causal, _, length = case
    return f"{dtype} d{head_dim} {'causal' if causal else 'full'} {length}"


def _of_moved(moved: list) -> str:
    rows, machine = bandwidth.newest(moved)
    if not rows:
        return NOT_MEASURED
    lines = [
        f"{_where(machine)}. Bytes of q, k and v read in bf16 and written, beside a copy of "
        "as many.",
        "",
        _cells("options", "head dim", "length", "GB/s", "copy", "ratio"),
        _cells(*["---"] * 6),
    ]
    for row in rows:
        rates = f"{row.gb_per_s:.0f}", f"{row.copy_gb_per_s:.0f}", f"{row.ratio:.2f}"
        lines.append(_cells(row.options, str(row.head_dim), str(row.length), *rates))
    return "\n".join(lines)


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
