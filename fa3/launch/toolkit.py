"""Which of its CUDA toolkits the DSL compiles with: it brings libraries for one or more.

The DSL takes the newest one that the driver can run, and the newest of all where there is no
driver. What it compiles depends on that, so the name of a cache entry does, too.
"""

import ctypes
import functools
from importlib.metadata import PackageNotFoundError, version

KNOWN = (12, 13)  # major versions of CUDA


@functools.cache
def installed() -> tuple[int, ...]:
    """Those whose libraries are installed, by major version."""
    return tuple(major for major in KNOWN if _is_installed(f"nvidia-cutlass-dsl-libs-cu{major}"))


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


@functools.cache
def of_driver() -> tuple[int, int] | None:
    """The newest CUDA version that the driver runs, as (12, 9); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    found = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(found)) != 0:
        return None
    return found.value // 1000, found.value % 1000 // 10


def choose(majors: tuple[int, ...], driver: tuple[int, int] | None) -> int | None:
    """Which of these the DSL takes with such a driver, None if that runs none of them."""
    return max((x for x in majors if driver is None or x <= driver[0]), default=None)


def chosen() -> int | None:
    """The one that this process compiles with."""
    return choose(installed(), of_driver())
