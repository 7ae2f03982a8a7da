"""Compile a kernel once: in memory for this process, on disk (cache.py) for all others.

A kernel is a string "module:Class". The class follows a small protocol, and nothing else is known
of it here: `Class(signature, config)` makes the kernel, `example_args()` gives what `cute.compile`
needs to see of the arguments (no memory, no GPU).

An entry on disk is one zip file with the object (host code and cubin), the cubin and the PTX. Its
name is a hash of everything that could change them. What runs is always what such an entry holds,
even in the process that compiled it.
"""

import functools
import importlib
import io
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Hashable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from . import cache, fingerprint, toolkit
from .locks import Lock

ARCH = "sm_90a"  # unless told
ENTRY_POINT = "fa3_entry"
# Line numbers in the PTX let the emulator name the line of the kernel that an error comes from.
OPTIONS = {"gpu": "", "emulator": "--generate-line-info"}


class Artifacts(NamedTuple):
    """What a compilation produces."""

    object: bytes  # relocatable ELF: host code around the cubin, with a TVM-FFI entry point
    cubin: bytes
    ptx: str


def _restore_streams() -> None:
    """In a forked child: the DSL catches what is printed while another thread compiles."""
    if _streams:
        sys.stdout, sys.stderr = _streams


_runs: dict[Hashable, Callable] = {}
_streams: tuple = ()  # stdout and stderr, while the DSL compiles
_compiling = Lock(_restore_streams)  # the DSL keeps its state in globals


def compile(kernel: str, signature, config, target: str, arch: str = ARCH) -> Callable:
    """The function that runs `kernel`, taking the arguments of its `__call__` without the stream.

    target: "gpu", or "emulator" for CPU tensors. arch: whose code it is, as `sm_80`.
    """
    key = kernel, signature, config, target, arch
    run = _runs.get(key)
    if run is None:
        with _compiling:
            run = _runs.get(key)
            if run is None:
                _check_process(target)
                run = _runs[key] = _load(_obtain(*key), target)
    return run


def artifacts(kernel: str, signature, config, arch: str = ARCH) -> Artifacts:
    """What `compile` would load, for reading; needs neither a GPU nor the emulator."""
    with _compiling:
        target = "emulator" if _emulating() else "gpu"
        return _obtain(kernel, signature, config, target, arch)


def entry_name(kernel: str, signature, config, target: str, arch: str = ARCH) -> str:
    """The name of the entry, which covers all that the compiled code depends on."""
    facts = {
        "kernel": kernel,
        "signature": repr(signature),
        "config": repr(config),
        "target": target,
        "arch": arch,
        "options": OPTIONS[target],
        "source": source_fingerprint(kernel, target),
        "dsl": version("nvidia-cutlass-dsl-libs-base"),  # the name of it that is always installed
        "toolkit": toolkit.chosen(),
        "tvm_ffi": version("apache-tvm-ffi"),
        "python": sys.version_info[:2],
    }
    return cache.name_of(facts, ".zip")


@functools.cache
def source_fingerprint(kernel: str, target: str) -> str:
    """A hash of the sources that generated code depends on."""
    is_emulated = target == "emulator"  # which names lines in its messages
    found = fingerprint.of_modules(kernel.partition(":")[0], with_lines=is_emulated)
    if is_emulated:  # what it changes in the DSL's code generation
        dsl = Path(__file__).resolve().parents[1] / "emulator" / "dsl.py"
        found += fingerprint.of_file(dsl, with_lines=False)
    return found


def _emulating() -> bool:
    emulator = sys.modules.get("fa3.emulator")
    return emulator is not None and emulator.installed()


def _check_process(target: str) -> None:
    """The emulator takes the place of the CUDA runtime for the whole process."""
    if target == "gpu" and _emulating():
        raise RuntimeError(
            "target is 'gpu', but the emulator is installed in this process and replaces the CUDA "
            "runtime: run CUDA tensors in a process without FA3_CPU=emulate"
        )


def _obtain(kernel: str, signature, config, target: str, arch: str) -> Artifacts:
    """From the disk if possible, else compiled and put there."""
    what = kernel, signature, config, target, arch
    return _unpacked(cache.obtain(entry_name(*what), lambda: _packed(_build(*what))))


def _build(kernel: str, signature, config, target: str, arch: str) -> Artifacts:
    global _streams
    os.environ.setdefault("CUTE_DSL_ARCH", arch)  # or the DSL asks the driver, which may be absent
    import cutlass.cute as cute

    module, _, name = kernel.partition(":")
    instance = getattr(importlib.import_module(module), name)(signature, config)
    with tempfile.TemporaryDirectory(prefix="fa3-") as folder:
        options = f"--enable-tvm-ffi --gpu-arch {arch} --keep-ptx --keep-cubin --dump-dir {folder}"
        _streams = sys.stdout, sys.stderr
        try:
            compiled = cute.compile(
                instance, *instance.example_args(), options=f"{options} {OPTIONS[target]}"
            )
        finally:
            _streams = ()
        file = Path(folder) / "kernel.o"
        compiled.export_to_c(object_file_path=str(file), function_name=ENTRY_POINT)
        return Artifacts(file.read_bytes(), compiled.__cubin__, compiled.__ptx__)


def _load(found: Artifacts, target: str) -> Callable:
    os.environ.setdefault("CUTE_DSL_ARCH", ARCH)
    import cutlass.cute as cute

    with tempfile.TemporaryDirectory(prefix="fa3-") as folder:
        file = Path(folder) / "kernel.o"
        file.write_bytes(found.object)
        module = cute.runtime.load_module(str(file), enable_tvm_ffi=True)
        function = module[ENTRY_POINT]
    if target == "gpu":
        return function
    from .. import emulator

    emulator.remember(found.cubin, _relocated(found.ptx))
    return functools.partial(emulator.call, function)


def _relocated(ptx: str) -> str:
    """PTX that names this package's sources: another checkout of them may have compiled it."""
    here = Path(__file__).resolve().parents[1] / "kernels"

    def named(match: re.Match) -> str:
        return f"{match[1]}{here / match[2]}" if (here / match[2]).is_file() else match[0]

    return re.sub(r'(?m)^(\s*\.file\s+\d+\s+")[^"]*/kernels/([^"]+)', named, ptx)


def _packed(found: Artifacts) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as entry:
        for name, part in zip(Artifacts._fields, found, strict=True):
            entry.writestr(name, part)
    return content.getvalue()


def _unpacked(content: bytes) -> Artifacts:
    with zipfile.ZipFile(io.BytesIO(content)) as entry:
        binary, cubin, ptx = (entry.read(name) for name in Artifacts._fields)
    return Artifacts(binary, cubin, ptx.decode())
