"""The example that trains: on the emulator a few steps of its smallest model."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_losses_are_those_of_torch(tmp_path):
    chart = tmp_path / "curves.png"
    environment = {k: v for k, v in os.environ.items() if k != "FA3_CPU"}
    command = [sys.executable, "docs/examples/train_gpt.py", "--tiny", "--chart", str(chart)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *(\d+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == [1, 2, 3, 4, 5, 6]
    losses = [(float(ours), float(theirs)) for _, ours, theirs in rows]
    assert losses[0][0] == losses[0][1] and losses[-1][0] < losses[0][0] - 0.5
    assert max(abs(ours - theirs) for ours, theirs in losses) < 1e-3  # 2e-4 is usual
    assert chart.read_bytes().startswith(b"\x89PNG")
