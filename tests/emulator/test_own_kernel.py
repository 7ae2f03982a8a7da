"""Kernels that are not fa3's: the example of the documentation, and one for sm_80."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example(emulator, monkeypatch, capsys):
    example = ROOT / "docs/examples/own_kernel.py"
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example))
    assert "right, eagerly, late and in 4 random orders: " in capsys.readouterr().out
    emulator_part = example.read_text().split("emulator.install", 1)[1]
    assert len([line for line in emulator_part.splitlines() if line]) <= 10


def test_sm_80(emulator):
    """cp.async, ldmatrix and mma.sync, in a process whose DSL compiles for another arch."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulator.ampere_kernel"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the write by cp.async of warp 0" in done.stdout
    assert "no cp.async.wait_group of its warp" in done.stdout
