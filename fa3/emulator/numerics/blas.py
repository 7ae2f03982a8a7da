"""The threads of numpy's matrix product.

A tile's product is too small for them: they would wait for each other, and on a machine that has
other things to do a launch would take several times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import numpy as np

# OpenBLAS as in numpy's wheels, and as distributions build it
_NAMES = (
    "scipy_openblas_{}_num_threads64_",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)

_before: list[int] = []  # what is to be restored at the end of a with block


@functools.cache
def _functions():
    """(get, set) of the number of threads; None for another BLAS."""
    library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # finds symbols of what it needs too
    for name in _NAMES:
        if hasattr(library, name.format("set")):
            return tuple(getattr(library, name.format(verb)) for verb in ("get", "set"))
    return None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products inside a with block run in their caller's thread."""
    functions = _functions()
    if functions is None:
        yield
        return
    get, put = functions
    _before.append(get())
    put(1)
    try:
        yield
    finally:
        put(_before.pop())


def restore() -> None:
    """In a forked child: end the with block of a thread that is not there."""
    if _before:
        _functions()[1](_before[0])
        _before.clear()
