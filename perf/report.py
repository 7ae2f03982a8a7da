"""What was measured, from the CSV files of perf/results: tables, summary, docs/performance.md.

python -m perf.report              the newest run of every pass as a table; rewrites the page
python -m perf.report --summary    a line per pass alone: ours over the best peer of every row
"""

import argparse
import statistics
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from . import bandwidth, page
from .backends import FA2_OWN, OURS, OWN
from .cases import PASSES
from .progress import end_with_reader
from .results import (
    RESULTS,
    Measured,
    Row,
    names,
    newest,
    over_fa2,
    panels,
    ratios,
    read_all,
    speeds,
)

NOT_MEASURED = "not measured"
BOLD, PLAIN = "\033[1m", "\033[0m"


def table(rows: list[Row], bold: bool = False) -> str:
    """TFLOPs/s by length and backend; ours in percent of the matrix product and of the best peer.

    bold marks the fastest of each line with terminal codes.
    """
    columns = names(rows)
    lines = []
    for panel in panels(rows):
        head = ["length", *columns, "matmul", "% matmul", "% best peer"]
        lines += ["", panel[0].title, "  ".join(f"{word:>12}" for word in head)]
        for length, group in groupby(panel, key=lambda row: row.length):
            lines.append(_line(length, {row.backend: row for row in group}, columns, bold))
    reasons = dict.fromkeys(f"{row.backend}: {row.note}" for row in rows if row.note)
    if reasons:
        lines += ["", "without a time:", *(f"  {reason}" for reason in reasons)]
    return "\n".join(lines).lstrip("\n")


def _line(length: int, by_name: dict[str, Row], columns: list[str], bold: bool) -> str:
    speed = {name: row.tflops for name, row in by_name.items() if row.tflops is not None}
    best = max(speed.values(), default=None)
    cells = [f"{length:>12}"]
    for name in columns:
        text = f"{speed[name]:>12.1f}" if name in speed else f"{'-':>12}"
        cells.append(f"{BOLD}{text}{PLAIN}" if bold and best and speed.get(name) == best else text)
    any_row = next((row for row in by_name.values() if row.matmul_tflops is not None), None)
    cells.append(f"{any_row.matmul_tflops:>12.1f}" if any_row else f"{'-':>12}")
    ours = by_name.get(OURS)
    peers = [value for name, value in speed.items() if name not in OWN]
    for value in (
        ours.percent_of_matmul if ours else None,
        100 * speed[OURS] / max(peers) if OURS in speed and peers else None,
    ):
        cells.append(f"{'-':>12}" if value is None else f"{value:>11.1f}%")
    return "  ".join(cells)


def summary(measured: Iterable[Measured]) -> list[str]:
    """One line per pass: its newest run beside the best peer of every row."""
    measured = list(measured)
    lines = []
    for of_pass in PASSES:
        run = newest(measured, of_pass)
        if not run:
            lines.append(f"{of_pass}: {NOT_MEASURED}")
            continue
        found, count = list(ratios(run.rows).values()), len(speeds(run.rows))
        where = f"on {run.machine.device}, {run.machine.date[:10]}"
        if not found:
            lines.append(f"{of_pass}: no peer beside any of {count} rows {where}")
            continue
        over = f"{count}" if len(found) == count else f"{len(found)} of {count}"
        mean, worst = statistics.geometric_mean(found), min(found)
        own = list(over_fa2(run.rows).values())
        times = f", geomean {statistics.geometric_mean(own):.2f} times {FA2_OWN}" if own else ""
        figures = f"geomean {mean:.2f} worst {worst:.2f} over {over} rows"
        lines.append(f"{of_pass}: {figures}{times} {where}")
    return lines


def main(argv: list[str] | None = None, folder: Path = RESULTS, target: Path = page.PAGE) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--summary", action="store_true", help="only a line per pass")
    options = parser.parse_args(argv)
    measured = read_all(folder)
    moved = read_all(folder, bandwidth.STEM, bandwidth.Moved)
    if not options.summary:
        for of_pass in PASSES:
            if run := newest(measured, of_pass):
                where = f"{run.machine.device}, {run.machine.date}, commit {run.machine.commit}"
                print(f"{of_pass} on {where}\n")
                print(table(run.rows, bold=sys.stdout.isatty()), end="\n\n")
        for path in page.write(target, measured, moved):
            print(f"written: {path}", file=sys.stderr)
    print("\n".join([*summary(measured), bandwidth.summary(moved)]))
    return 0


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
