"""This project's kernels for Ampere, on a Hopper GPU beside those for Hopper: FA3_ARCH=sm_80.

What is remembered of calls is apart, so that a call finds its plan as fast as others do.
"""

import functools
import os

from torch import Tensor

from ..cases import Case
from . import forward
from .common import Call, module

ARCH = "sm_80"
REMEMBERING = (
    *(("fa3.ops", "plan_of"), ("fa3.ops", "_check_layouts")),
    *(("fa3.autograd", "plan_of"), ("fa3.autograd", "_check_layouts")),
    ("fa3.launch.dispatch", "target_of"),
)


def fa2(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlashAttention-2 in CuTe DSL."""
    attend, ampere = forward.fa3(case, q, k, v), as_ampere()

    def call() -> Tensor:
        with ampere:
            return attend()

    return call


@functools.cache
def as_ampere() -> "_Ampere":
    return _Ampere()


class _Ampere:
    """While it is entered, calls get the kernels for Ampere."""

    def __init__(self):
        places = [(module(name), function) for name, function in REMEMBERING]
        own = [functools.lru_cache(maxsize=4096)(getattr(*place).__wrapped__) for place in places]
        self._swapped = list(zip(places, own, strict=True))
        self._arch = ARCH

    def __enter__(self):
        self._swap()

    def __exit__(self, *error):
        self._swap()

    def _swap(self) -> None:
        for i, ((owner, name), function) in enumerate(self._swapped):
            self._swapped[i] = (owner, name), getattr(owner, name)
            setattr(owner, name, function)
        other = os.environ.pop("FA3_ARCH", None)
        if self._arch is not None:
            os.environ["FA3_ARCH"] = self._arch
        self._arch = other
