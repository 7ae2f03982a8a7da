"""The sweep's table, CSV and chart, from synthetic rows. None of these numbers was measured."""

import csv
import re
from dataclasses import replace
from itertools import combinations

import pytest

from perf import bandwidth, charts, page
from perf.backends import FA2_OWN
from perf.bandwidth import Moved
from perf.cases import BACKWARD, PASSES, Case, flops
from perf.charts import write_chart
from perf.report import BOLD, main, summary, table
from perf.results import RESULTS, Machine, Row, read_all, read_csv, write_csv

SYNTHETIC = Machine("SYNTHETIC GPU", "0.0", "0.0", "0.0", "synthetic", "1970-01-01T00:00Z")

NOTHING = [f"{of_pass}: not measured" for of_pass in PASSES]


def row(backend, tflops, length=1024, causal=False, head_dim=64):
    case = Case.paper("bf16", head_dim, causal, length)
    ms = flops(case) / tflops / 1e9
    return Row.of(
        case, backend, ms=ms, tflops=tflops, matmul_tflops=200.0, percent_of_matmul=tflops / 2
    )


@pytest.fixture
def rows():
    absent = Row.of(Case.paper("bf16", 64, False, 1024), "fa4", note="not installed")
    return [
        *(row("fa3", 120.0), row("fa2", 100.0), absent),
        *(row("fa3", 90.0, length=2048), row("fa2", 150.0, length=2048)),
        *(row("fa3", 60.0, causal=True), row("fa2", 30.0, causal=True)),
    ]


def test_table(rows):
    lines = table(rows).splitlines()
    assert lines[0] == "bf16 head dim 64 full"
    assert lines[1].split()[:4] == ["length", "fa3", "fa2", "matmul"]
    assert lines[2].split() == ["1024", "120.0", "100.0", "200.0", "60.0%", "120.0%"]
    assert lines[3].split() == ["2048", "90.0", "150.0", "200.0", "45.0%", "60.0%"]
    assert lines[5] == "bf16 head dim 64 causal"
    assert lines[7].split() == ["1024", "60.0", "30.0", "200.0", "30.0%", "200.0%"]
    assert lines[-1] == "  fa4: not installed"


def test_table_marks_the_fastest(rows):
    marked = re.findall(re.escape(BOLD) + r" *([\d.]+)", table(rows, bold=True))
    assert marked == ["120.0", "150.0", "60.0"]
    assert BOLD not in table(rows)


def test_table_without_ours():
    line = table([row("fa2", 100.0)]).splitlines()[2]
    assert line.split() == ["1024", "100.0", "200.0", "-", "-"]


def test_table_where_nothing_ran():
    absent = Row.of(Case.paper("bf16", 64, False, 1024), "fa3", note="no kernel")
    assert table([absent]).splitlines()[2].split() == ["1024", "-", "-", "-"]


def test_csv_carries_the_machine_in_every_line(rows, tmp_path):
    path = tmp_path / "synthetic.csv"
    write_csv(path, rows, SYNTHETIC)
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    assert {line["device"] for line in read} == {"SYNTHETIC GPU"}
    assert {line["commit"] for line in read} == {"synthetic"}
    assert read[0]["tflops"] == "120.0" and read[2]["tflops"] == ""
    assert read[2]["note"] == "not installed"


def test_chart_is_a_picture_with_a_bar_for_every_time(rows, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib: pip install fa3[perf]")
    from matplotlib.axes import Axes

    heights = []
    plain = Axes.bar

    def bar(self, x, height, *args, **options):
        heights.extend(height)
        return plain(self, x, height, *args, **options)

    monkeypatch.setattr(Axes, "bar", bar)
    path = tmp_path / "synthetic.png"
    write_chart(path, rows, SYNTHETIC)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(heights) == [30.0, 60.0, 90.0, 100.0, 120.0, 150.0]


@pytest.fixture
def chart():
    """A figure of two passes: fa4 and fa2 are in one each, "mine" has no colour of its own."""
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib: pip install fa3[perf]")
    made = []
    for head_dim, causal, backends in (
        (64, False, ("fa3", "fa2")),
        (64, True, ("fa3", "mine", "fa4")),
        (128, False, ("fa4", "fa3")),
    ):
        for length in (512, 1024, 2048, 4096, 8192, 16_384):
            for i, name in enumerate(backends):
                one = row(name, 640.0 + i, length, causal, head_dim)
                made.append(replace(one, ms_low=0.9 * one.ms, ms_high=1.25 * one.ms))
    return charts.draw(made, SYNTHETIC), made


def test_a_backend_has_one_colour_in_all_panels_and_the_legend_names_all(chart):
    figure, _ = chart
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["fa3", "fa2", "mine", "fa4", charts.PRODUCT]
    handles = zip(texts, legend.legend_handles, strict=True)
    shown = {text: h.get_facecolor() for text, h in handles if text != charts.PRODUCT}
    assert len(set(shown.values())) == 4
    seen = [
        (bars.get_label(), bars.patches[0].get_facecolor())
        for axis in figure.axes
        for bars in axis.containers
    ]
    assert [name for name, _ in seen] == ["fa3", "fa2", "fa3", "mine", "fa4", "fa4", "fa3"]
    assert all(colour == shown[name] for name, colour in seen)


def test_quartiles_are_drawn_and_values_stand_apart(chart):
    figure, made = chart
    drawn = [
        tuple(line.get_ydata())
        for axis in figure.axes
        for line in axis.lines
        if line.get_label() != charts.PRODUCT
    ]
    expected = {(one.tflops / 1.25, one.tflops / 0.9) for one in made}
    assert {tuple(round(y, 6) for y in pair) for pair in drawn} == {
        tuple(round(y, 6) for y in pair) for pair in expected
    }
    assert len(drawn) == len(made)
    figure.canvas.draw()
    for axis in figure.axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(axis.get_window_extent().contains(*box.max) for box in boxes)


def test_a_row_without_quartiles_has_its_median_alone():
    assert charts.quartiles(row("fa3", 100.0)) == (100.0, 100.0)


def measured(rows, **where):
    return [(one, replace(SYNTHETIC, **where)) for one in rows]


def test_csv_is_read_as_it_was_written(rows, tmp_path):
    path = tmp_path / "synthetic.csv"
    write_csv(path, rows, SYNTHETIC)
    assert read_csv(path) == measured(rows)


def test_csv_from_before_a_column_was_there(rows, tmp_path):
    path = tmp_path / "synthetic.csv"
    write_csv(path, rows, SYNTHETIC)
    with path.open() as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        del line["of_pass"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    assert read_csv(path) == measured(rows)


def test_summary(rows):
    """120 / 100, 90 / 150 and 60 / 30."""
    mean = (1.2 * 0.6 * 2.0) ** (1 / 3)
    assert summary(measured(rows)) == [
        f"forward: geomean {mean:.2f} worst 0.60 over 3 rows on SYNTHETIC GPU, 1970-01-01",
        *NOTHING[1:],
    ]


def test_summary_takes_the_best_peer(rows):
    faster = row("cudnn", 240.0)
    assert "worst 0.50 over 3 rows" in summary(measured([*rows, faster]))[0]


def test_summary_counts_a_row_that_ours_could_not_do(rows):
    alone = row("fa2", 50.0, length=4096)
    assert "over 3 of 4 rows" in summary(measured([*rows, alone]))[0]


def test_summary_is_of_the_newest_run_alone(rows):
    later = measured([row("fa3", 70.0), row("fa2", 100.0)], date="1970-01-02T00:00Z")
    line = summary(later + measured(rows))[0]
    assert line == "forward: geomean 0.70 worst 0.70 over 1 rows on SYNTHETIC GPU, 1970-01-02"


def test_summary_where_nothing_was_measured(rows):
    peers = [one for one in rows if one.backend != "fa3"]
    assert summary([]) == summary(measured(peers)) == NOTHING


def test_summary_without_any_peer():
    line = summary(measured([row("fa3", 70.0)]))[0]
    assert line == "forward: no peer beside any of 1 rows on SYNTHETIC GPU, 1970-01-01"


def fp8_row(backend, tflops, head_dim=128):
    case = Case.paper("e4m3", head_dim, False, 1024)
    return Row.of(case, backend, ms=flops(case) / tflops / 1e9, tflops=tflops)


def test_gradients_are_a_pass_of_their_own_and_are_compared_with_fa2_too(rows):
    case = Case.paper("bf16", 64, False, 1024, BACKWARD)
    speeds = ("fa3", 300.0), ("cudnn", 250.0), (FA2_OWN, 200.0)
    back = [Row.of(case, name, ms=1.0, tflops=speed) for name, speed in speeds]
    forward, _, backward, _ = summary(measured([*rows, *back]))
    assert "worst 0.60 over 3 rows on" in forward
    assert "geomean 1.20 worst 1.20 over 1 rows, geomean 1.50 times fa2 (this pro" in backward
    assert "bf16 head dim 64 full, backward" in table([*rows, *back])


def test_our_own_kernels_are_no_peers():
    rows = [fp8_row("fa3", 90.0), fp8_row("fa3-bf16", 95.0), fp8_row("cudnn", 60.0)]
    assert summary(measured(rows))[1].startswith("forward fp8: geomean 1.50 worst 1.50 over 1 rows")
    assert table(rows).splitlines()[2].split()[-1] == "150.0%"


MOVED = [
    Moved("block scales", 64, 1024, 16, 32, 1.0, 900.0, 1000.0),
    Moved("hadamard", 64, 1024, 16, 32, 1.0, 800.0, 1000.0),
    Moved("hadamard", 128, 1024, 16, 16, note="no kernel"),
]


def test_bandwidth_is_a_share_of_a_copys(tmp_path):
    path = tmp_path / "quantize-synthetic.csv"
    write_csv(path, MOVED, SYNTHETIC)
    read = read_csv(path, Moved)
    assert [row for row, _ in read] == MOVED
    figures = f"geomean {(0.9 * 0.8) ** 0.5:.2f} worst 0.80 of a copy over 2 rows"
    assert bandwidth.summary(read) == f"quantize: {figures} on SYNTHETIC GPU, 1970-01-01"
    assert bandwidth.summary([]) == "quantize: not measured"


def test_bytes_that_quantising_moves_are_counted_once():
    """By a stand-in clock: 2 ms a call."""
    case = Moved("block scales", 64, 256, 1, 2)
    found = bandwidth.measure(case, 3, lambda call, n: [2.0] * n, device="cpu")
    values = 3 * 256 * 2 * 64
    scales = 3 * 4 * 2 * 2  # fp32, two heads of two blocks of 128 rows
    assert found.gb_per_s == pytest.approx((2 * values + values + scales) / 2e-3 / 1e9)
    assert found.ratio == pytest.approx(1, rel=1e-3)


def sections(page_text):
    parts = re.split(r"^## (.*)$", page_text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_a_page_without_measurements_has_no_figures():
    found = sections(page.text([], []))
    parts = ["Forward", "Forward FP8", "Backward", "Forward and backward", "quantize_fp8"]
    assert list(found) == parts
    assert {text.strip() for text in found.values()} == {"Not measured."}


def test_the_committed_page_is_that_of_the_committed_measurements():
    measured = read_all(RESULTS)
    assert page.PAGE.read_text() == page.text(measured, read_all(RESULTS, "quantize", Moved))


def test_the_page_names_what_is_behind(rows):
    ours, bf16, peer = fp8_row("fa3", 90.0), fp8_row("fa3-bf16", 95.0), fp8_row("cudnn", 60.0)
    found = sections(page.text(measured([*rows, ours, bf16, peer]), []))
    forward, fp8 = found["Forward"], found["Forward FP8"]
    assert "SYNTHETIC GPU, driver 0.0, torch 0.0, CuTe DSL 0.0, commit synthetic" in forward
    assert "worst 0.60, ahead in 2 of 3 rows." in forward
    assert "| 1024 | 120 | 100 | fa2 | 1.20 | 200 | 60% |" in forward
    assert "Behind the best peer: bf16 d64 full 2048 (0.60)." in forward
    assert "- fa4: not installed" in forward
    assert "Behind" not in fp8
    assert "Slower than our own bf16 kernel: e4m3 d128 full 1024 (0.95)." in fp8


def test_every_speed_of_the_page_is_in_the_measurements(rows):
    text = sections(page.text(measured(rows), []))["Forward"]
    speeds = {f"{one.tflops:.0f}" for one in rows if one.tflops} | {"200", "-"}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    found = [cells for cells in lines if cells and cells[0].isdigit()]
    assert len(found) == 3
    assert {cells[i] for cells in found for i in (1, 2, 5)} <= speeds


def test_command(rows, tmp_path, capsys):
    results, target = tmp_path / "results", tmp_path / "page.md"
    results.mkdir()
    nothing = [*NOTHING, "quantize: not measured"]
    assert main(["--summary"], results, target) == 0
    assert capsys.readouterr().out.splitlines() == nothing and not target.exists()
    write_csv(results / "sweep-synthetic.csv", rows, SYNTHETIC)
    assert main([], results, target) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "forward on SYNTHETIC GPU, 1970-01-01T00:00Z, commit synthetic"
    assert lines[-5:] == [*summary(measured(rows)), nothing[-1]]
    assert target.read_text() == page.text(measured(rows), [])
    chart = tmp_path / "performance-forward.png"
    assert chart.name in target.read_text()
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert main(["--summary"], results, target) == 0
    assert capsys.readouterr().out.splitlines() == lines[-5:]
