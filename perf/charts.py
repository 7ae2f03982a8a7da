"""The chart of a sweep: a panel per dtype, head dim and mask."""

from itertools import cycle
from pathlib import Path

from .results import Machine, Row, names, panels

COLOURS = {
    "fa3": "#c0392b",
    "fa3-cpp": "#2c3e50",
    "fa4": "#2980b9",
    "cudnn": "#27ae60",
    "fa2": "#b0b6bb",
    "fa2 (this project)": "#6c8ebf",
    "fa3-unscaled": "#e67e22",
    "fa3-bf16": "#d7a9a3",
}
OTHERS = ("#8e44ad", "#16a085", "#f1c40f", "#7f5539", "#ff7eb6", "#5d6d7e")
PRODUCT = "matrix product"
BAR = 0.16  # inches, at least: room for a value that stands upright


def colours(rows: list[Row]) -> dict[str, str]:
    """One colour per backend, whatever panel it is in."""
    others = cycle(OTHERS)
    return {name: COLOURS.get(name) or next(others) for name in names(rows)}


def write_chart(path: Path, rows: list[Row], machine: Machine) -> None:
    """Bars by length and backend with their quartiles, a line for the matrix product."""
    draw(rows, machine).savefig(path, dpi=130)


def draw(rows: list[Row], machine: Machine):
    """The chart as a figure of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [panel for panel in panels(rows) if names(panel)]
    wide = 2 if len(groups) > 1 else 1
    high = -(-len(groups) // wide)
    bars = max(len({row.length for row in panel}) * len(names(panel)) for panel in groups)
    width = max(7, 1.2 * BAR * bars)
    figure = Figure(figsize=(width * wide, 3.4 * high + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(high, wide, squeeze=False).flat)
    colour = colours(rows)
    for axis, panel in zip(axes, groups, strict=False):
        _draw_panel(axis, panel, colour)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    figure.legend(*_entries(axes, [*colour, PRODUCT]), loc="outside lower center", ncols=6)
    figure.suptitle(
        f"Attention, TFLOPs/s: {machine.device}, driver {machine.driver}, "
        f"{machine.date}, commit {machine.commit}",
        fontsize=10,
    )
    return figure


def _entries(axes: list, order: list[str]) -> tuple[list, list[str]]:
    """Handles and labels of what any of the panels has, each once."""
    found = {}
    for axis in axes:
        found.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = [label for label in order if label in found]
    return [found[label] for label in labels], labels


def _draw_panel(axis, panel: list[Row], colour: dict[str, str]) -> None:
    lengths = list(dict.fromkeys(row.length for row in panel))
    place = {length: i for i, length in enumerate(lengths)}
    backends = names(panel)
    width = 0.84 / len(backends)
    for i, name in enumerate(backends):
        rows = [row for row in panel if row.backend == name and row.tflops is not None]
        x = [place[row.length] - 0.42 + (i + 0.5) * width for row in rows]
        axis.bar(x, [row.tflops for row in rows], width, label=name, color=colour[name])
        for at, row in zip(x, rows, strict=True):
            low, high = quartiles(row)
            axis.plot([at, at], [low, high], color="black", linewidth=0.7)
            axis.annotate(
                f"{row.tflops:.0f}",
                (at, high),
                (0, 1.5),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.2},
            )
    ceiling = [(place[row.length], row.matmul_tflops) for row in panel if row.matmul_tflops]
    if ceiling:
        ceiling = sorted(dict(ceiling).items())
        x, y = zip(*ceiling, strict=True)
        axis.plot(x, y, color="grey", linestyle="--", marker="_", linewidth=1, label=PRODUCT)
    axis.set_title(panel[0].title, fontsize=9)
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
    axis.set_xlabel("length", fontsize=8)
    axis.set_ylabel("TFLOPs/s", fontsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])


def quartiles(row: Row) -> tuple[float, float]:
    """The speeds at the quartiles of the time, the median twice where there are none."""
    if not (row.ms and row.ms_low and row.ms_high):
        return row.tflops, row.tflops
    return row.tflops * row.ms / row.ms_high, row.tflops * row.ms / row.ms_low
