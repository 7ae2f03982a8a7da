"""Builds shim.c, the stand-in for the DSL's CUDA runtime library, and connects its callbacks."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..launch import cache
from .errors import SetupError

SOURCE = Path(__file__).with_name("shim.c")
# cutlass.runtime.load_module recognises the runtime among CUTE_DSL_LIBS by this name
LIBRARY = "libcute_dsl_runtime.so"
FLAGS = ("-O1", "-shared", "-fPIC")


class Launch(ctypes.Structure):
    """launch_t of shim.c."""

    _fields_ = [
        ("kernel", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("cooperative", ctypes.c_uint32),
        ("pdl", ctypes.c_uint32),
        ("smem_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("params", ctypes.POINTER(ctypes.c_void_p)),
    ]


_LOAD = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p)
_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))
_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
_ALLOC = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)


def compiler() -> list[str]:
    """The C compiler command: $CC, or the first of cc, gcc, clang on the path."""
    if command := shlex.split(os.environ.get("CC", "")):
        if shutil.which(command[0]):
            return command
        raise SetupError(f"the emulator needs a C compiler, and CC={os.environ['CC']!r} is not one")
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise SetupError(
        "the emulator needs a C compiler for its stand-in CUDA runtime: none of cc, gcc, clang "
        "is on the PATH. Install one or set CC."
    )


def build(folder: Path) -> Path:
    """The compiled shim, in a folder of this process; compiled only if the cache has none."""
    facts = {
        "source": SOURCE.read_text(),
        "flags": FLAGS,
        "compiler": os.environ.get("CC", ""),
        "libc": platform.libc_ver(),
    }
    library = folder / LIBRARY
    library.write_bytes(cache.obtain(cache.name_of(facts, ".runtime"), _compile))
    return library


def _compile() -> bytes:
    with tempfile.TemporaryDirectory(prefix="fa3_emulator_") as folder:
        output = Path(folder) / LIBRARY
        command = [*compiler(), *FLAGS, "-o", str(output), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SetupError(
                f"building the stand-in CUDA runtime failed: {shlex.join(command)}\n{done.stderr}"
            )
        return output.read_bytes()


class Shim:
    """The loaded library with the callbacks it holds."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise SetupError(
                f"the stand-in CUDA runtime cannot be loaded: {error}. It lies in the folder for "
                "temporary files, which must allow code to be executed (see TMPDIR)"
            ) from error
        self._callbacks: tuple = ()

    def connect(
        self,
        *,
        load: Callable,
        kernel: Callable,
        launch: Callable,
        attribute: Callable,
        alloc: Callable,
    ) -> None:
        self._callbacks = (
            _LOAD(load),
            _KERNEL(kernel),
            _LAUNCH(launch),
            _ATTRIBUTE(attribute),
            _ALLOC(alloc),
        )
        self._library.fa3_emulator_install(
            *(ctypes.cast(f, ctypes.c_void_p) for f in self._callbacks)
        )

    def failed(self, text: str) -> None:
        """Let the error that TVM-FFI raises for a failed launch say why."""
        self._library.fa3_emulator_failed(text.encode())
