"""The chart of a sweep: a panel per dtype, head dim and mask."""

from pathlib import Path

from .results import Machine, Row, names, panels

COLOURS = {
    "fa3": "#c0392b",
    "fa3-cpp": "#2c3e50",
    "fa4": "#2980b9",
    "cudnn": "#27ae60",
    "fa2": "#b0b6bb",
    "fa3-unscaled": "#e67e22",
    "fa3-bf16": "#d7a9a3",
}


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
        f"Attention, TFLOPs/s: {machine.device}, driver {machine.driver}, "
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
