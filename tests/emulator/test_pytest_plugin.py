"""fa3.emulator.pytest_plugin in a project and a process of their own, as a stranger uses it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = 'pytest_plugins = ["fa3.emulator.pytest_plugin"]\n'
TESTS = """
import pytest
import torch

import cutlass
import cutlass.cute as cute
from cutlass import memory
from cutlass.cute.runtime import from_dlpack


@cute.kernel
def _reverse(a: cute.Tensor, waits: cutlass.Constexpr[bool]):
    t = cute.arch.thread_idx()[0]
    kept = memory.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout(64))
    kept[t] = a[t]
    if cutlass.const_expr(waits):
        cute.arch.sync_threads()
    a[t] = kept[63 - t]


@cute.jit
def reverse(a: cute.Tensor, waits: cutlass.Constexpr[bool]):
    _reverse(a, waits).launch(grid=[1, 1, 1], block=[64, 1, 1])


def call(waits):
    a = torch.arange(64, dtype=torch.int32)
    kernel = cute.compile(reverse, from_dlpack(a), waits)
    kernel(from_dlpack(a))
    return a.tolist()


def test_right(emulated):
    assert call(True) == list(range(64))[::-1]


def test_racy(emulated):
    call(False)


@pytest.mark.emulated(checks=())
def test_unchecked(emulated):
    call(False)


@pytest.mark.emulated(checks=())
@pytest.mark.parametrize("schedule", ["late", "random"])
def test_options(emulated, request, schedule):
    from fa3.emulator import settings

    assert settings.current().checks == ()
    with emulated.options(schedule=schedule):
        assert call(True)[0] == 63
"""


def test_a_project_of_its_own(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_reverse.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("FA3_CPU", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 4 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_reverse.py::test_racy" in done.stdout
    assert "(kept) unordered with the write by warp" in done.stdout
