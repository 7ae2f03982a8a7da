"""Installation and its errors, functions from object files, and what stays registered."""

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fa3.emulator import dsl, shim
from fa3.emulator.errors import SetupError
from fa3.emulator.images import Images

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, tmp_path: Path, **environment) -> str:
    """Run a script in a process of its own; returns what it printed."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CUTE_DSL_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**inherited, "PYTHONPATH": search, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_installing_twice_is_harmless_and_another_arch_is_not(emulator):
    emulator.install()
    assert emulator.installed()
    with pytest.raises(SetupError, match="installed for sm_90a, not sm_80"):
        emulator.install("sm_80")


@pytest.mark.parametrize("arch", ["sm_70", "sm_100", "sm_100a", "hopper", None])
def test_an_arch_that_it_does_not_run_is_refused(arch):
    from fa3 import emulator

    with pytest.raises(SetupError, match=f"arch is {arch!r}, expected one of sm_80, .*, sm_90a$"):
        emulator.install(arch)


def test_an_unknown_version_of_the_dsl_is_refused(monkeypatch):
    monkeypatch.setattr(dsl.importlib.metadata, "version", lambda name: "4.9.0")
    with pytest.raises(SetupError, match=r"known to work with 4\.8\.1; installed is 4\.9\.0"):
        dsl.check_version()


def test_a_missing_dsl_is_named(monkeypatch):
    def missing(name):
        raise dsl.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(dsl.importlib.metadata, "version", missing)
    with pytest.raises(SetupError, match="needs nvidia-cutlass-dsl 4.8.1, which is not installed"):
        dsl.check_version()


def test_without_a_c_compiler_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SetupError, match="needs a C compiler.*Install one or set CC"):
        shim.compiler()
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(SetupError, match="CC='no-such-compiler -O3' is not one"):
        shim.compiler()


def test_the_shim_is_built_with_cc_and_kept(monkeypatch, tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho called >> {log}\nexec {shim.compiler()[0]} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    library = shim.build(tmp_path)
    assert library == tmp_path / shim.LIBRARY and ctypes.CDLL(str(library)).fa3_emulator_install
    library.unlink()
    assert shim.build(tmp_path) == library
    assert log.read_text() == "called\n"
    (entry,) = (tmp_path / "cache").glob("*.runtime")
    entry.write_bytes(entry.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        shim.build(tmp_path)
    monkeypatch.setenv("FA3_CACHE", "0")
    shim.build(tmp_path)
    assert log.read_text() == "called\n" * 3
    assert ctypes.CDLL(str(library)).fa3_emulator_install


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho broken toolchain >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(SetupError, match="broken toolchain"):
        shim.build(tmp_path)


PRELUDE = """
    import sys
    import torch
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import load_module, make_fake_stream, make_fake_tensor
    from fa3 import emulator

    def compiled():
        from tests.emulator import kernels
        fakes = [make_fake_tensor(cutlass.Float32, (128,), (1,)) for _ in range(3)]
        return cute.compile(kernels.add, *fakes, make_fake_stream(use_tvm_ffi_env_stream=True),
                            options="--enable-tvm-ffi")

    a, b, c = torch.randn(3, 128)
"""


def test_a_forgotten_install_is_named_and_comes_too_late_afterwards(tmp_path):
    said = python(
        PRELUDE
        + """
    from cutlass.cute.runtime import from_dlpack
    from tests.emulator import kernels

    @cute.jit
    def add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
        kernels._add(a, b, c, 0).launch(grid=[1, 1, 1], block=[128, 1, 1])

    def with_ffi():
        compiled()(a, b, c)

    def without_ffi():
        cute.compile(add, *map(from_dlpack, (a, b, c)))(*map(from_dlpack, (a, b, c)))

    def broken():
        raise TypeError("its own fault")

    for call in (with_ffi, without_ffi, broken):
        try:
            with emulator.profile():
                call()
        except Exception as error:
            print(type(error).__name__, error)
    try:
        emulator.install()
    except emulator.SetupError as error:
        print(error)
    """,
        tmp_path,
        CUTE_DSL_ARCH="sm_90a",
        CUDA_VISIBLE_DEVICES="",
    )
    hint = "SetupError the kernel was compiled for a GPU, as the emulator is not installed: call "
    first, second, third, fourth = said.splitlines()
    assert first.startswith(hint) and second.startswith(hint)
    assert third == "TypeError its own fault"
    assert "came too late" in fourth


def test_a_forked_child_that_ends_takes_nothing_away(emulator, tmp_path):
    """From an emulator that was installed after the DSL was imported."""
    said = python(
        PRELUDE
        + """
    import os
    emulator.install()
    child = os.fork()
    if child == 0:
        sys.exit()
    os.waitpid(child, 0)
    compiled()(a, b, c)
    print(torch.equal(c, a + b))
    """,
        tmp_path,
    )
    assert said == "True\n"


def test_what_an_installation_leaves_on_the_disk(emulator, tmp_path):
    """With its cache and without one: children of a process that has only imported it."""
    for name in ("kept", "not kept"):
        for folder in ("home", "temporary"):
            (tmp_path / name / folder).mkdir(parents=True)
    python(
        f"""
    import os
    from pathlib import Path
    from fa3 import emulator

    for name, cache in (("kept", "1"), ("not kept", "0")):
        child = os.fork()
        if child == 0:
            folder = Path({str(tmp_path)!r}) / name
            os.environ.update(
                HOME=str(folder / "home"),
                TMPDIR=str(folder / "temporary"),
                FA3_CACHE_DIR="~/c",
                FA3_CACHE=cache,
            )
            emulator.install()
            raise SystemExit
        assert os.waitpid(child, 0)[1] == 0
    """,
        tmp_path,
    )
    for name, expected in (("kept", [".lock", ".runtime"]), ("not kept", [])):
        folder = tmp_path / name
        left = sorted(x.suffix for x in (folder / "home").rglob("*") if x.is_file())
        assert left == expected
        assert not list((folder / "temporary").glob("fa3*"))
    assert not list(tmp_path.rglob("~"))


def test_functions_from_object_files(emulator, compiled, tmp_path):
    """Exported here, loaded in another process with the cubin and PTX that were kept."""
    function = compiled("add", *torch.randn(3, 128))
    function.export_to_c(str(tmp_path / "add.o"), function_name="add")
    (tmp_path / "cubin").write_bytes(function.__cubin__)
    (tmp_path / "ptx").write_text(function.__ptx__)
    said = python(
        f"""
    from pathlib import Path
    import torch
    from cutlass.cute.runtime import load_module
    from fa3 import emulator

    emulator.install()
    folder = Path({str(tmp_path)!r})
    a, b, c = torch.randn(3, 128)
    function = load_module(str(folder / "add.o"), enable_tvm_ffi=True)["add"]
    emulator.remember((folder / "cubin").read_bytes(), (folder / "ptx").read_text())
    emulator.call(function, a, b, c)
    print(torch.equal(c, a + b))
    try:
        function(a, b, c)
    except RuntimeError as error:
        print(error)
    """,
        tmp_path,
    )
    assert said.startswith("True\n")
    assert "OutOfBounds: global read" in said and "none is registered" in said


def test_a_kernel_without_ptx_is_named(emulator, compiled, monkeypatch):
    a, b, c = torch.randn(3, 128)
    monkeypatch.setattr(Images, "remember", lambda self, cubin, ptx: None)
    forgotten = compiled("add", a, b, c, excess=1025)  # no other test compiles it
    with pytest.raises(SetupError, match="no PTX is known for kernel kernel_cutlass"):
        forgotten(a, b, c)


def test_images_are_recognised_by_the_cubin_inside():
    def elf(size, fill):
        blob = bytearray(bytes([fill]) * size)
        blob[:4] = b"\x7fELF"
        blob[0x20:0x30] = bytes(16)
        blob[0x28] = 64  # section headers at 64, one of (size - 64) bytes
        blob[0x36:0x3A] = bytes(4)
        blob[0x3A:0x3E] = bytes([size - 64, 0, 1, 0])
        return bytes(blob)

    images = Images()
    images.remember(elf(128, 1), "first")
    images.remember(elf(160, 2), "second")
    images.remember(elf(160, 2), "second again")
    assert images.find(b"fatbin header" + elf(128, 1) + b"padding") == "first"
    assert images.find(elf(160, 2)) == "second again"
    assert images.find(elf(128, 3)) is None and images.find(b"") is None


def test_calls_keep_nothing_registered_and_nothing_alive(emulator, compiled):
    import weakref

    from fa3.emulator import _device

    gc.collect()
    before = len(_device.memory)
    a, b, c = (torch.randn(64) for _ in range(3))
    function = compiled("add", a, b, c)
    gc.collect()
    function(a, b, c)
    gone = weakref.ref(a)
    del a
    gc.collect()
    assert gone() is None
    assert len(_device.memory) == before


def test_registered_tensors_stay_until_they_are_collected(emulator):
    from fa3.emulator import _device

    before = len(_device.memory)
    kept, array = torch.zeros(8), np.zeros((4, 4))
    emulator.register(kept[2:], array.T)
    emulator.register(kept)
    assert len(_device.memory) == before + 1  # views that were dropped are gone already
    address = kept.data_ptr()
    assert _device.memory.find(address, address + 32).end == address + 32
    del kept
    gc.collect()
    assert len(_device.memory) == before


def test_arguments_are_found_inside_containers(emulator):
    import dataclasses

    from fa3.emulator import _device

    @dataclasses.dataclass
    class Pair:
        first: torch.Tensor
        others: list

    tensors = [torch.zeros(4) for _ in range(4)]
    nested = (Pair(tensors[0], [tensors[1]]), {"x": tensors[2]}, None, 3)

    def inside(*args):
        for t in tensors:
            _device.memory.find(t.data_ptr(), t.data_ptr() + 16)
        return "called"

    assert emulator.call(inside, nested, tensors[3]) == "called"


def test_launch_statistics(emulator, compiled):
    a, b, c = torch.randn(3, 300)
    function = compiled("add", a, b, c)
    before = len(emulator.launches)
    function(a, b, c)
    (launch,) = emulator.launches[before:]
    assert launch["grid"] == (3, 1, 1) and launch["block"] == (128, 1, 1)
    assert launch["cluster"] == (1, 1, 1) and launch["instructions"] > 30


def test_errors_do_not_outlive_their_call(emulator, compiled):
    a, b, c = torch.randn(3, 128)
    broken = compiled("add", a, b, c, excess=4096)
    with emulator.options(checks=()):
        for _ in range(2):
            with pytest.raises(emulator.OutOfBounds):
                broken(a, b, c.clone())
        compiled("add", a, b, c)(a, b, c)
    assert torch.equal(c, a + b)


def test_threads_take_turns(emulator, compiled):
    tensors = [torch.randn(3, 3000) for _ in range(4)]
    function = compiled("add", *tensors[0])
    threads = [threading.Thread(target=function, args=tuple(t)) for t in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(t[2], t[0] + t[1]) for t in tensors)


def test_options(emulator):
    with emulator.options(checks=("proxy",), late=True) as outer:
        assert outer.checks == ("proxy", "late")
        with emulator.options(sms=7, late=False) as inner:
            assert (inner.sms, inner.checks) == (7, ("proxy",))
    with emulator.options(checks="race") as one:
        assert one.checks == ("race",)
    with pytest.raises(ValueError, match=r"unknown checks \['typo'\]; known are proxy"):
        emulator.options(checks="typo").__enter__()
    with pytest.raises(ValueError, match=r"unknown checks \['typo'\]; known are proxy"):
        emulator.configure(checks=("typo",))
    with pytest.raises(ValueError, match="sms must be at least 1, not 0"):
        emulator.configure(sms=0)
    with pytest.raises(ValueError, match='"sums" needs the checks "race" and "global"'):
        emulator.configure(checks=("sums", "race"))
    assert set(emulator.ALL_CHECKS) == set(emulator.CHECKS) - {"sums"}
