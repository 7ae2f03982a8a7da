"""One compilation per kernel: in memory, on disk, among processes, and after damage."""

import dataclasses
import io
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

import fa3
from fa3.launch import dispatch, jit

from .cases import Case, make_inputs
from .forks import in_child

KERNEL = "tests.tiny_kernel:Scale"
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The signature and config that the tests compile; classes without the DSL's import."""

    negate: bool = False
    threads: int = 32


SIGNATURE, CONFIG = Tiny(), Tiny()


@pytest.fixture
def builds(monkeypatch):
    """Counts compilations, in a process that remembers none."""
    count = []
    build = jit._build

    def counted(*arguments):
        count.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(jit, "_build", counted)
    monkeypatch.setattr(jit, "_runs", {})
    return count


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FA3_CACHE", raising=False)
    return tmp_path


def run_tiny(device, rows=5, columns=40, factor=2.0, signature=SIGNATURE, config=CONFIG):
    """Compile or find the kernel, run it, check what it wrote."""
    run = jit.compile(KERNEL, signature, config, dispatch.target_of(device).kind)
    x = torch.randn(rows, columns, device=device).bfloat16()
    out = torch.empty_like(x)
    run(x, out, factor)
    sign = -1 if signature.negate else 1
    torch.testing.assert_close(out, (x.float() * factor * sign).bfloat16())
    return run


def entries(folder):
    return sorted(folder.glob("*.zip"))


def forget(monkeypatch):
    """As if the process had just started."""
    monkeypatch.setattr(jit, "_runs", {})


def test_memory(device, builds, folder):
    assert run_tiny(device) is run_tiny(device, rows=1, columns=400, factor=-0.5)
    assert len(builds) == 1


def test_signature_and_config_are_the_key(device, builds, folder):
    run_tiny(device)
    run_tiny(device, signature=Tiny(negate=True))
    run_tiny(device, config=Tiny(threads=64))
    assert len(builds) == 3
    assert len(entries(folder)) == 3


def test_disk(device, builds, folder, monkeypatch):
    run_tiny(device)
    assert len(entries(folder)) == 1
    forget(monkeypatch)
    run_tiny(device)
    assert len(builds) == 1


def test_disk_can_be_switched_off(device, builds, folder, monkeypatch):
    monkeypatch.setenv("FA3_CACHE", "0")
    run_tiny(device)
    forget(monkeypatch)
    run_tiny(device)
    assert len(builds) == 2
    assert list(folder.iterdir()) == []


def test_damaged_entry_is_rebuilt(device, builds, folder, monkeypatch):
    run_tiny(device)
    (path,) = entries(folder)
    path.write_bytes(path.read_bytes()[:-1])
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="is damaged"):
        run_tiny(device)
    assert len(builds) == 2


def test_entry_without_its_checksum(device, builds, folder, monkeypatch):
    """A sound zip file is not enough."""
    run_tiny(device)
    (path,) = entries(folder)
    with zipfile.ZipFile(path) as entry:
        parts = {name: entry.read(name) for name in entry.namelist()}
    assert set(parts) == {"object", "cubin", "ptx"}
    with zipfile.ZipFile(path, "w") as entry:
        for name, part in parts.items():
            entry.writestr(name, part)
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="is damaged .wrong checksum"):
        run_tiny(device)
    assert len(builds) == 2


def test_source_is_part_of_the_key(device, builds, folder, monkeypatch):
    run_tiny(device)
    fingerprint = jit.source_fingerprint
    monkeypatch.setattr(jit, "source_fingerprint", lambda *a: fingerprint(*a) + "edited")
    forget(monkeypatch)
    run_tiny(device)
    assert len(builds) == 2
    assert len(entries(folder)) == 2


def test_entries_of_both_targets_differ():
    names = {jit.entry_name(KERNEL, SIGNATURE, CONFIG, target) for target in ("gpu", "emulator")}
    assert len(names) == 2


def test_architectures_have_entries_of_their_own(builds, folder):
    for arch in ("sm_80", "sm_89"):
        assert f".target {arch}" in jit.artifacts(KERNEL, SIGNATURE, CONFIG, arch).ptx
    assert len(builds) == len(entries(folder)) == 2


PROCESS = """
import sys, time
import torch
from fa3.launch import dispatch, jit
from tests.test_jit import CONFIG, KERNEL, SIGNATURE, run_tiny
built = []
build = jit._build
jit._build = lambda *a: (built.append(a), time.sleep(1), build(*a))[-1]
device = torch.device(sys.argv[1])
dispatch.target_of(device)
print('ready', flush=True)
sys.stdin.readline()
run_tiny(device)
print(len(built))
"""


def test_processes_at_once(device, folder):
    """Three start together; one compiles, the others wait for its entry, all compute."""
    environment = {**os.environ, "FA3_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(device)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    built = [int(process.communicate(timeout=300)[0]) for process in processes]
    assert sorted(built) == [0, 0, 1]
    assert len(entries(folder)) == 1


def test_a_fork_while_another_thread_compiles(device, folder, monkeypatch):
    """The child compiles and prints as usual."""
    if device.type == "cuda":
        pytest.skip("a forked child cannot use CUDA")
    import cutlass.cute as cute

    compile_, parent = cute.compile, os.getpid()
    compiling, forked, streams = threading.Event(), threading.Event(), (sys.stdout, sys.stderr)

    def slow(*args, **options):
        if os.getpid() == parent:
            sys.stdout = sys.stderr = io.StringIO()  # as the DSL does
            compiling.set()
            forked.wait()
            sys.stdout, sys.stderr = streams
        return compile_(*args, **options)

    monkeypatch.setattr(cute, "compile", slow)
    forget(monkeypatch)
    thread = threading.Thread(target=run_tiny, args=(device,))
    thread.start()
    compiling.wait()

    def question():
        assert (sys.stdout, sys.stderr) == streams
        run_tiny(device, signature=Tiny(negate=True))
        return True

    try:
        assert in_child(question)
    finally:
        forked.set()
        thread.join()
    assert len(entries(folder)) == 2


def test_artifacts(builds, folder):
    found = jit.artifacts(KERNEL, SIGNATURE, CONFIG)
    assert found.cubin[:4] == b"\x7fELF"
    assert found.object[:4] == b"\x7fELF"
    assert found.cubin in found.object
    assert ".target sm_90a" in found.ptx
    assert jit.artifacts(KERNEL, SIGNATURE, CONFIG) == found
    assert len(builds) == 1


def test_emulating_process_refuses_gpu_code(device, folder):
    if device.type == "cuda":
        pytest.skip("the emulator is not installed where a GPU runs the tests")
    with pytest.raises(RuntimeError, match="target is 'gpu', but the emulator is installed"):
        jit.compile(KERNEL, SIGNATURE, CONFIG, "gpu")


def test_attention_compiles_once(device, builds, folder, monkeypatch):
    """Other lengths, batches, heads, strides, head dims of the tile, scales, windows, grids."""
    fa3.ops.plan_of.cache_clear()
    calls = [
        Case(window=(10, 5)),
        Case(s_q=33, s_k=70, batch=2, window=(-1, 3)),
        Case(h_q=6, h_k=2, layout="bhsd", window=(10, 5), softmax_scale=0.3),
        Case(head_dim=40, head_dim_v=8, layout="packed", causal=True, window=(7, -1)),
    ]
    for case in calls:
        q, k, v = (x.tensor for x in make_inputs(case, device))
        fa3.flash_attn_func(q, k, v, case.softmax_scale, case.causal, window_size=case.window)
        fa3.flash_attn_func(q, k, v, window_size=case.window, causal=case.causal, sm_margin=4)
    assert len(builds) == 1
    assert len(entries(folder)) == 1
    fa3.ops.plan_of.cache_clear()


def test_line_information_names_the_sources_that_are_here():
    ours = '.file 1 "/elsewhere/fa3/kernels/sm90/forward/kernel.py"'
    others = '.file 2 "/elsewhere/kernels/of_somebody.py"\nadd.s32 %r1, %r2, %r3;'
    first, rest = jit._relocated(f"{ours}\n{others}").split("\n", 1)
    path = Path(first.split('"')[1])
    assert path.samefile(ROOT / "kernels/sm90/forward/kernel.py")
    assert rest == others
