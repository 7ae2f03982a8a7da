"""The sweep's table, CSV and chart, from synthetic rows. None of these numbers was measured."""

import csv
import re
from dataclasses import replace

import pytest

from perf.cases import Case, flops
from perf.report import (
    BOLD,
    Machine,
    Row,
    main,
    read_csv,
    summary,
    table,
    write_chart,
    write_csv,
)

SYNTHETIC = Machine("SYNTHETIC GPU", "0.0", "0.0", "0.0", "synthetic", "1970-01-01T00:00Z")


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
        f"forward: geomean {mean:.2f} worst 0.60 over 3 rows on SYNTHETIC GPU, 1970-01-01"
    ]


def test_summary_takes_the_best_peer(rows):
    faster = row("cudnn", 240.0)
    assert "worst 0.50 over 3 rows" in summary(measured([*rows, faster]))[0]


def test_summary_counts_a_row_that_ours_could_not_do(rows):
    alone = row("fa2", 50.0, length=4096)
    assert "over 3 of 4 rows" in summary(measured([*rows, alone]))[0]


def test_summary_is_of_the_newest_run_alone(rows):
    later = measured([row("fa3", 70.0), row("fa2", 100.0)], date="1970-01-02T00:00Z")
    (line,) = summary(later + measured(rows))
    assert line == "forward: geomean 0.70 worst 0.70 over 1 rows on SYNTHETIC GPU, 1970-01-02"


def test_summary_where_nothing_was_measured(rows):
    peers = [one for one in rows if one.backend != "fa3"]
    assert summary([]) == summary(measured(peers)) == ["forward: not measured"]


def test_summary_without_any_peer():
    (line,) = summary(measured([row("fa3", 70.0)]))
    assert line == "forward: no peer beside any of 1 rows on SYNTHETIC GPU, 1970-01-01"


def test_command(rows, tmp_path, capsys):
    assert main(["--summary"], tmp_path) == 0
    assert capsys.readouterr().out == "forward: not measured\n"
    write_csv(tmp_path / "synthetic.csv", rows, SYNTHETIC)
    assert main([], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "forward on SYNTHETIC GPU, 1970-01-01T00:00Z, commit synthetic"
    assert lines[-1] == summary(measured(rows))[0]
    assert main(["--summary"], tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == lines[-1:]
