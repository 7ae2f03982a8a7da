"""Exported models: by torch.export and AOTInductor, used by a process that knows fa3.ops alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fa3

ROOT = Path(__file__).resolve().parents[1]


class Model(torch.nn.Module):
    """Dense and packed attention, softcap and a sink."""

    def forward(self, q, k, v, cu_seqlens):
        dense = fa3.flash_attn_func(q, k, v, causal=True, softcap=5.0)
        b, s, *_ = q.shape
        packed = (x.flatten(0, 1) for x in (q, k, v))
        sink = torch.zeros(q.shape[2])
        ragged = fa3.flash_attn_varlen_func(
            *packed, cu_seqlens, cu_seqlens, b * s, b * s, window_size=(9, 3), learnable_sink=sink
        )
        return dense, ragged


def _inputs(s):
    q, k, v = (torch.randn(2, s, h, 32).bfloat16() for h in (4, 2, 2))
    return q, k, v, torch.tensor([0, s // 2, 2 * s], dtype=torch.int32)


IN_ANOTHER_PROCESS = """
import sys, torch, fa3.ops
folder = sys.argv[1]
given, found = torch.load(f"{folder}/given.pt"), {}
for name in sys.argv[2:]:
    if name == "inductor":
        model = torch._inductor.aoti_load_package(f"{folder}/{name}.pt2")
    else:
        model = torch.export.load(f"{folder}/{name}.pt2").module()
    found[name] = model(*given)
torch.save(found, f"{folder}/found.pt")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the models compute of inputs of another length, by the way that they were exported."""
    folder = tmp_path_factory.mktemp("export")
    s = torch.export.Dim("s", min=2, max=4096)
    shapes = [{1: s}] * 3 + [None]
    program = torch.export.export(Model(), _inputs(40), dynamic_shapes=shapes)
    names = ["saved"]
    torch.export.save(program, folder / "saved.pt2")
    if shutil.which("g++"):
        names.append("inductor")
        torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/inductor.pt2")
    torch.save(_inputs(17), folder / "given.pt")
    code = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder), *names]
    environment = {**os.environ, "FA3_CPU": "reference"}
    done = subprocess.run(
        code, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "given.pt"), torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved", "inductor"])
def test_in_another_process(name, results, plain_torch):
    given, found = results
    if name not in found:
        pytest.skip("AOTInductor needs g++")
    for x, wanted in zip(found[name], Model()(*given), strict=True):
        assert torch.equal(x, wanted)
