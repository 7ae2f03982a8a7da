"""What a sweep leaves behind: a terminal table, a CSV file, a PNG chart, one line per pass.

python -m perf.report              the newest run of perf/results: its table and its summary
python -m perf.report --summary    the summary alone: ours over the best peer of every row
"""

import argparse
import csv
import statistics
import sys
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from .backends import OURS
from .cases import Case

RESULTS = Path(__file__).resolve().parent / "results"  # what was measured and committed
FORWARD = "forward"
PASSES = (FORWARD,)  # each has its line in the summary, measured or not
NOT_MEASURED = "not measured"
BOLD, PLAIN = "\033[1m", "\033[0m"
COLOURS = {
    "fa3": "#c0392b",
    "fa3-cpp": "#2c3e50",
    "fa4": "#2980b9",
    "cudnn": "#27ae60",
    "fa2": "#b0b6bb",
}


@dataclass(frozen=True)
class Machine:
    """Where and when a sweep ran."""

    device: str
    driver: str
    torch: str
    dsl: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One backend on one case. Where it has no time, `note` says why and the numbers are None."""

    dtype: str
    head_dim: int
    causal: bool
    length: int
    batch: int
    heads: int
    backend: str
    ms: float | None = None  # median
    ms_low: float | None = None  # quartiles
    ms_high: float | None = None
    tflops: float | None = None
    matmul_tflops: float | None = None  # of the matrix product timed among the same rounds
    percent_of_matmul: float | None = None
    row_error: float | None = None
    sm_mhz: int | None = None  # under load, after the case
    memory_mhz: int | None = None
    note: str = ""
    of_pass: str = FORWARD

    @classmethod
    def of(cls, case: Case, backend: str, **measured) -> "Row":
        return cls(
            case.dtype,
            case.head_dim,
            case.causal,
            case.length,
            case.batch,
            case.heads,
            backend,
            **measured,
        )

    @property
    def panel(self) -> tuple[str, int, bool]:
        return self.dtype, self.head_dim, self.causal

    @property
    def title(self) -> str:
        return f"{self.dtype} head dim {self.head_dim} {'causal' if self.causal else 'full'}"


Measured = tuple[Row, Machine]


def panels(rows: Iterable[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row.panel)]


def names(rows: Iterable[Row]) -> list[str]:
    """The backends that have at least one time, in the order of the rows."""
    return list(dict.fromkeys(row.backend for row in rows if row.tflops is not None))


def table(rows: list[Row], bold: bool = False) -> str:
    """TFLOPs/s by length and backend; ours in percent of the matrix product and of the best peer.

    bold marks the fastest of each line with terminal codes.
    """
    columns = names(rows)
    lines = []
    for panel in panels(rows):
        head = ["length", *columns, "matmul", "% matmul", "% best peer"]
        lines += ["", panel[0].title, "  ".join(f"{word:>11}" for word in head)]
        for length, group in groupby(panel, key=lambda row: row.length):
            lines.append(_line(length, {row.backend: row for row in group}, columns, bold))
    reasons = dict.fromkeys(f"{row.backend}: {row.note}" for row in rows if row.note)
    if reasons:
        lines += ["", "without a time:", *(f"  {reason}" for reason in reasons)]
    return "\n".join(lines).lstrip("\n")


def _line(length: int, by_name: dict[str, Row], columns: list[str], bold: bool) -> str:
    speed = {name: row.tflops for name, row in by_name.items() if row.tflops is not None}
    best = max(speed.values(), default=None)
    cells = [f"{length:>11}"]
    for name in columns:
        text = f"{speed[name]:>11.1f}" if name in speed else f"{'-':>11}"
        cells.append(f"{BOLD}{text}{PLAIN}" if bold and best and speed.get(name) == best else text)
    any_row = next((row for row in by_name.values() if row.matmul_tflops is not None), None)
    cells.append(f"{any_row.matmul_tflops:>11.1f}" if any_row else f"{'-':>11}")
    ours = by_name.get(OURS)
    peers = [value for name, value in speed.items() if name != OURS]
    for value in (
        ours.percent_of_matmul if ours else None,
        100 * speed[OURS] / max(peers) if OURS in speed and peers else None,
    ):
        cells.append(f"{'-':>11}" if value is None else f"{value:>10.1f}%")
    return "  ".join(cells)


def write_csv(path: Path, rows: Iterable[Row], machine: Machine) -> None:
    """One line per backend and case; each carries the machine, so that files can be joined."""
    columns = [f.name for f in fields(Row)] + [f.name for f in fields(Machine)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({**asdict(row), **asdict(machine)})


def read_csv(path: Path) -> list[Measured]:
    """What write_csv wrote; a column that the file does not have yet gets its default."""
    with path.open(newline="") as file:
        return [row_of(line) for line in csv.DictReader(file)]


def row_of(line: dict[str, str]) -> Measured:
    return _parsed(Row, line), _parsed(Machine, line)


def _parsed(kind, line: dict[str, str]):
    values = {}
    for field in fields(kind):
        text = line.get(field.name)
        if text is None:
            continue
        (plain, *_) = typing.get_args(field.type) or (field.type,)
        if plain is bool:
            values[field.name] = text == "True"
        elif plain is str or text:
            values[field.name] = plain(text)
    return kind(**values)


def ratios(rows: Iterable[Row]) -> dict[tuple, float]:
    """Ours over the best peer, by (dtype, head_dim, causal, length) of the cases that have both."""
    found = {}
    for case, speed in _speeds(rows).items():
        peers = [value for name, value in speed.items() if name != OURS]
        if OURS in speed and peers:
            found[case] = speed[OURS] / max(peers)
    return found


def _speeds(rows: Iterable[Row]) -> dict[tuple, dict[str, float]]:
    """case -> backend -> TFLOPs/s; a case in which nothing has a time is there too."""
    speeds: dict[tuple, dict[str, float]] = {}
    for row in rows:
        of_case = speeds.setdefault((*row.panel, row.length), {})
        if row.tflops is not None:
            of_case[row.backend] = row.tflops
    return speeds


def newest(measured: Iterable[Measured], of_pass: str) -> list[Measured]:
    """The rows of the last run in which ours has a time: figures of one run only are compared."""
    rows = [(row, machine) for row, machine in measured if row.of_pass == of_pass]
    runs = [m for row, m in rows if row.backend == OURS and row.tflops is not None]
    if not runs:
        return []
    last = max(runs, key=lambda machine: machine.date)
    return [(row, machine) for row, machine in rows if machine == last]


def summary(measured: Iterable[Measured]) -> list[str]:
    """One line per pass: its newest run beside the best peer of every row."""
    measured = list(measured)
    lines = []
    for of_pass in PASSES:
        run = newest(measured, of_pass)
        if not run:
            lines.append(f"{of_pass}: {NOT_MEASURED}")
            continue
        rows, machine = [row for row, _ in run], run[0][1]
        found, count = list(ratios(rows).values()), len(_speeds(rows))
        where = f"on {machine.device}, {machine.date[:10]}"
        if not found:
            lines.append(f"{of_pass}: no peer beside any of {count} rows {where}")
            continue
        over = f"{count}" if len(found) == count else f"{len(found)} of {count}"
        mean, worst = statistics.geometric_mean(found), min(found)
        lines.append(f"{of_pass}: geomean {mean:.2f} worst {worst:.2f} over {over} rows {where}")
    return lines


def write_chart(path: Path, rows: list[Row], machine: Machine) -> None:
    """Bars by length and backend, a panel per dtype, head dim and mask; a line for the matmul."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [panel for panel in panels(rows) if names(panel)]
    backends = names(rows)
    wide = 2 if len(groups) > 1 else 1
    high = -(-len(groups) // wide)
    figure = Figure(figsize=(7 * wide, 3.4 * high + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(high, wide, squeeze=False)
    for axis, panel in zip(axes.flat, groups, strict=False):
        _draw_panel(axis, panel, backends)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(
        f"Attention forward, TFLOPs/s: {machine.device}, driver {machine.driver}, "
        f"{machine.date}, commit {machine.commit}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _draw_panel(axis, panel: list[Row], backends: list[str]) -> None:
    lengths = list(dict.fromkeys(row.length for row in panel))
    place = {length: i for i, length in enumerate(lengths)}
    width = 0.84 / len(backends)
    for i, name in enumerate(backends):
        rows = [row for row in panel if row.backend == name and row.tflops is not None]
        x = [place[row.length] - 0.42 + (i + 0.5) * width for row in rows]
        bars = axis.bar(x, [row.tflops for row in rows], width, label=name, color=COLOURS.get(name))
        axis.bar_label(bars, fmt="%.0f", fontsize=5)
    ceiling = [(place[row.length], row.matmul_tflops) for row in panel if row.matmul_tflops]
    if ceiling:
        ceiling = sorted(dict(ceiling).items())
        x, y = zip(*ceiling, strict=True)
        axis.plot(x, y, color="grey", linestyle="--", linewidth=1, label="matrix product")
    axis.set_title(panel[0].title, fontsize=9)
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
    axis.set_xlabel("length", fontsize=8)
    axis.set_ylabel("TFLOPs/s", fontsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="y", linewidth=0.3)


def main(argv: list[str] | None = None, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--summary", action="store_true", help="only a line per pass")
    options = parser.parse_args(argv)
    measured = [line for path in sorted(folder.glob("*.csv")) for line in read_csv(path)]
    if not options.summary:
        for of_pass in PASSES:
            run = newest(measured, of_pass)
            if run:
                machine = run[0][1]
                print(f"{of_pass} on {machine.device}, {machine.date}, commit {machine.commit}\n")
                print(table([row for row, _ in run], bold=sys.stdout.isatty()), end="\n\n")
    print("\n".join(summary(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
