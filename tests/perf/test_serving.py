"""The sweep of serving: what it would time is right, and its figures are those of the clock."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perf import serving
from perf.backends import Absent

ROOT = Path(__file__).resolve().parents[2]


def absent(step, cache):
    raise Absent("not installed")


def wrong(step, cache):
    call = serving.fa3(step, cache)
    return lambda: call() * 1.2


@pytest.mark.parametrize(
    "step",
    [
        serving.Step("decode", "bf16", batch=3, keys=70, group=2, page_size=16),
        serving.Step("verify", "e4m3", batch=2, keys=64, group=1, page_size=64),
    ],
    ids=str,
)
def test_rows_of_a_stand_in_clock(step, plain_torch):
    """Every call takes 2 ms, so does the copy of 1,000 bytes."""
    backends = {"fa3": serving.fa3, "sdpa": serving.sdpa, "cpp": absent, "wrong": wrong}
    rows = serving.measure(step, backends, 3, lambda call, n: [2.0] * n, "cpu", copied=1000)
    rows = {row.backend: row for row in rows}
    assert rows["fa3"].us == 2000 and rows["cpp"].note == "not installed"
    assert "off by 0.2" in rows["wrong"].note and rows["wrong"].us is None
    assert (rows["sdpa"].us is None) == (step.kind == "verify")
    size = 2 if step.dtype == "bf16" else 1
    moved = 2 * step.batch * step.keys * 8 * 128 * size
    moved += 2 * 2 * step.batch * step.queries * step.group * 8 * 128
    assert step.bytes == moved
    assert rows["fa3"].gb_per_s == pytest.approx(moved / 2e-3 / 1e9)
    assert rows["fa3"].percent_of_copy == pytest.approx(100 * moved / 2000)


def test_every_case_is_there():
    every = serving.cases(
        *(serving.QUERIES, serving.DTYPES, serving.BATCHES),
        *(serving.KEYS, serving.GROUPS, serving.PAGES),
    )
    assert len(every) == len(set(map(str, every))) == 2 * 3 * 3 * 4 * 2 * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the sweep would run")
def test_without_a_gpu_it_says_so_and_does_nothing_else(tmp_path):
    command = [sys.executable, "-m", "perf.serving", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "perf.serving: there is no CUDA GPU here, so nothing was measured or written.\n"
    )
    assert list(tmp_path.iterdir()) == []
