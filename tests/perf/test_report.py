"""The sweep's table, CSV and chart, from synthetic rows. None of these numbers was measured."""

import csv
import re

import pytest

from perf.cases import Case, flops
from perf.report import BOLD, Machine, Row, table, write_chart, write_csv

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
