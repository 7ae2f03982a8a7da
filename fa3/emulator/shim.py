"""Builds shim.c, the stand-in for the DSL's CUDA runtime library, and connects its callbacks."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

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


def _folders(tag: str):
    """Where the built library may live, best first."""
    if root := os.environ.get("FA3_CACHE_DIR"):
        yield Path(root) / "emulator" / tag
    yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fa3/emulator" / tag
    private = tempfile.mkdtemp(prefix="fa3_emulator_")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    yield Path(private)


def build() -> Path:
    """The compiled shim, from the cache folder if it was built before."""
    tag = hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode()).hexdigest()[:16]
    for folder in _folders(tag):
        library = folder / LIBRARY
        if library.exists():
            return library
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=folder, suffix=".so")
        except OSError:
            continue
        os.close(handle)
        _compile(partial)
        os.replace(partial, library)
        return library
    raise SetupError("no folder to put the emulator's stand-in CUDA runtime into")


def _compile(output: str) -> None:
    command = [*compiler(), *FLAGS, "-o", output, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        os.unlink(output)
        raise SetupError(
            f"building the stand-in CUDA runtime failed: {shlex.join(command)}\n{done.stderr}"
        )


class Shim:
    """The loaded library with the callbacks it holds."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
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
