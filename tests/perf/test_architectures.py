"""The table of docs/transformers.md: each architecture once, nothing wrong in it."""

import re

import pytest

from perf import architectures
from perf.architectures import BEGIN, COLUMNS, DOCUMENT, END, RESULTS, Verdict

VERDICTS = [
    Verdict("a", "A", "not built", "ValueError: 7"),
    Verdict("b", "B", "runs"),
    Verdict("c", "C", "refused", "c: fa3 takes head dims up to 256, got 512; use this"),
    Verdict("d", "D", "refused", "d: fa3 takes head dims up to 256, got 320; use this"),
    Verdict("e", "E", "refused", "E: fa3 takes no x; use that"),
    Verdict("f", "F", "runs", "padded: f: fa3 has no window; use this"),
    Verdict("g", "G", "runs", padded=True),
]


def rows(text):
    body = text.partition(BEGIN)[2].partition(END)[0]
    cells = [re.split(r" *\| *", line.strip("| ")) for line in body.splitlines() if "|" in line]
    assert tuple(cells[0]) == COLUMNS
    return cells[2:]


def test_what_runs_by_the_other_name_is_a_column():
    verdicts = [Verdict("a", "A", "runs", flash="refused"), Verdict("b", "B", "runs")]
    found = [row[:3] for row in rows(architectures.markdown(verdicts, "made"))]
    assert sorted(found) == [["runs", "", "1"], ["runs", "refused", "1"]]


def test_a_row_per_result_and_reason():
    assert rows(architectures.markdown(VERDICTS, "made")) == [
        ["runs", "", "2", "-", "b, g"],
        ["runs", "", "1", "of padded batches: has no window; use this", "f"],
        ["refused", "", "2", "takes head dims up to 256, got 512; use this", "c, d"],
        ["refused", "", "1", "takes no x; use that", "e"],
        ["not built", "", "1", "-", "a"],
    ]


def test_the_document_counts_each_architecture_once():
    found = rows(DOCUMENT.read_text())
    names = [name for row in found for name in row[4].split(", ")]
    assert len(names) == len(set(names)) == sum(int(row[2]) for row in found)
    counts = {result: sum(int(row[2]) for row in found if row[0] == result) for result in RESULTS}
    assert counts["wrong"] == counts["fails"] == 0
    assert counts["runs"] > 250


@pytest.mark.parametrize("name", ["llama", "bloom", "t5", "mamba"])
def test_the_document_says_what_is_so_now(name, plain_torch):
    pytest.importorskip("transformers", reason="the integration needs it")
    (result,) = [row[0] for row in rows(DOCUMENT.read_text()) if name in row[4].split(", ")]
    assert architectures.judge(name).result == result
