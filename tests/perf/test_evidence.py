"""docs/evidence.md: one line per kernel variant, and no speed that was not measured."""

import csv
import re

import pytest

from fa3.inspect.cli import shipped_config
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import Signature
from perf import evidence
from perf.cases import Case
from perf.evidence import NOT_MEASURED
from perf.results import Machine, Row, write_csv
from perf.variants import Variant

SYNTHETIC = Machine("SYNTHETIC GPU", "0.0", "0.0", "0.0", "synthetic", "1970-01-01T00:00Z")


@pytest.fixture(scope="module")
def lines():
    text = evidence.DOCUMENT.read_text()
    table = text.partition(evidence.BEGIN)[2].partition(evidence.END)[0]
    cells = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines() if "|" in line]
    assert tuple(cells[0]) == evidence.COLUMNS
    return {row[0]: dict(zip(evidence.COLUMNS, row, strict=True)) for row in cells[2:]}


def test_every_variant_has_its_line(lines):
    assert list(lines) == [variant.name for variant in evidence.every()]


def test_every_tile_is_the_one_that_a_call_gets(lines):
    for variant in evidence.every():
        config, line = shipped_config(variant.signature, variant.target), lines[variant.name]
        assert line["tile"] == f"{config.tile_m} x {config.tile_n}", variant
        assert line["stages"] == str(config.num_stages), variant


def test_speeds_come_from_committed_sweeps(lines):
    for variant in evidence.every():
        line = lines[variant.name]
        assert (line["Hopper GPU"], line["TFLOPs/s"]) == evidence.measured(variant), variant


def test_a_sweep_fills_the_lines_it_measured(tmp_path):
    case = Case.paper("bf16", 128, True, 8192)
    rows = [
        Row.of(case, "fa3", ms=1.0, tflops=123.4),
        Row.of(case, "cudnn", ms=1.0, tflops=999.0),
        Row.of(Case.paper("bf16", 128, False, 8192), "fa3", note="wrong output"),
    ]
    write_csv(tmp_path / "sweep-synthetic.csv", rows, SYNTHETIC)
    with (tmp_path / "sweep-synthetic.csv").open() as file:
        assert len(list(csv.reader(file))) == 4
    causal, full, fp16 = (
        evidence.measured(Variant(Signature(dtype, 128, 128, mask)), tmp_path)
        for dtype, mask in (("bf16", "causal"), ("bf16", "full"), ("fp16", "causal"))
    )
    assert causal == ("SYNTHETIC GPU, 1970-01-01", "123 at 8192")
    assert full == fp16 == (NOT_MEASURED, NOT_MEASURED)
    others = (
        Variant(BwdSignature("bf16", 128, 128, "causal")),
        Variant(Signature("bf16", 128, 128, "causal"), "sm_80"),
    )
    assert {evidence.measured(x, tmp_path) for x in others} == {(NOT_MEASURED, NOT_MEASURED)}


def test_the_table_goes_between_its_marks():
    document = f"before\n{evidence.BEGIN}\nold\n{evidence.END}\nafter\n"
    row = ("a",) * len(evidence.COLUMNS)
    table = evidence.markdown([row], ["made today"])
    new = evidence.insert(document, table)
    assert new.startswith("before\n") and new.endswith("\nafter\n")
    assert "old" not in new and "made today" in new
    assert evidence.insert(new, table) == new
    made, rows = evidence.written(new)
    assert (made, rows) == (["made today"], {"a": row})
    made = evidence.made_now(made, "Rows of backward: ")
    assert made[0] == "made today" and made[1].startswith("Rows of backward: 20")
    assert len(evidence.made_now(made, "Rows of backward: ")) == 2
    assert len(evidence.made_now(made, "")) == 1
    with pytest.raises(ValueError, match="no table"):
        evidence.insert("nothing", table)
