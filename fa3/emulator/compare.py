"""The same call under several schedules: what it computes must not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np

from . import settings
from .errors import KernelError
from .execution.report import place
from .naming import named

_MOST = 5  # suspects named


class ScheduleDifference(KernelError):
    """The outputs of a call depend on when asynchronous work completes or on which warps run first.

    output: its number.  index: of its first differing element.  schedules: the two, as texts.
    """

    def __init__(self, text: str, output: int, index: tuple[int, ...], schedules: tuple[str, str]):
        super().__init__(text)
        self.output, self.index, self.schedules = output, index, schedules


def compare_schedules(
    run: Callable[[], Sequence],
    seeds: Iterable[int] = range(8),
    *,
    checks: str | Iterable[str] | None = None,
) -> Sequence:
    """Call run() under the eager, the late and seeded random schedules; returns its eager outputs.

    run launches kernels and returns torch tensors or numpy arrays on the CPU, freshly computed each
    time.  checks: as in options(), default the current ones.  Raises ScheduleDifference where an
    output is not the same to the bit, and whatever the checks raise.
    """
    base = settings.current().checks if checks is None else settings.names(checks)
    base = tuple(c for c in base if c != "late")
    first = None
    for schedule, seed in [("eager", 0), ("late", 0), *(("random", s) for s in seeds)]:
        trace: list = []
        with settings.options(checks=base, schedule=schedule, seed=seed, trace=trace, profile=None):
            outputs = [_copied(x) for x in run()]
        if first is None:
            first = outputs
            continue
        name = f"random, seed {seed}" if schedule == "random" else schedule
        for i, (x, y) in enumerate(zip(first, outputs, strict=True)):
            _require_equal(i, x, y, name, trace)
    return first


def _copied(x):
    return x.detach().clone() if hasattr(x, "detach") else np.array(x)


def _bits(x) -> np.ndarray:
    """(elements, bytes of one)"""
    if hasattr(x, "detach"):
        import torch

        return x.contiguous().view(-1, 1).view(torch.uint8).numpy()
    return np.ascontiguousarray(x).reshape(-1, 1).view(np.uint8)


def _require_equal(number: int, x, y, name: str, trace: list) -> None:
    differ = (_bits(x) != _bits(y)).any(1)
    if not differ.any():
        return
    at = int(differ.argmax())
    index = tuple(int(i) for i in np.unravel_index(at, tuple(x.shape)))
    values = [t.reshape(-1)[at].item() for t in (x, y)]
    text = (
        f"output {number} differs between the schedules eager and {name}: {int(differ.sum())} of "
        f"{len(differ)} elements, the first at {index}: {values[0]} and {values[1]}\n"
        f"{_suspects(trace)}"
    )
    raise ScheduleDifference(text, number, index, ("eager", name))


def _suspects(trace: list) -> str:
    """Operations that were in flight over the same bytes, in the words of the kernel's source."""
    found: dict[tuple, str] = {}
    for a, b in combinations(trace, 2):
        key = (a.site, b.site)
        if len(found) < _MOST and key not in found and (shared := a.conflict(b)):
            low, high = shared
            launch = a.w.launch
            bytes_ = named(
                f"shared memory {low:#x}..{high - 1:#x}", launch.kernel, launch.dynamic_smem
            )
            found[key] = (
                f"  in flight over {bytes_} at once:\n    {_described(a)}\n    {_described(b)}"
            )
    if not found:
        return (
            "no two asynchronous operations met: ordinary accesses of other warps are suspect "
            '(see the check "race")'
        )
    return "\n".join(found.values())


def _described(operation) -> str:
    w = operation.w
    return (
        f"{operation.what} of CTA {w.cta.position}, warps {w.warps(operation.mask)}, at "
        f"{place(w.launch.kernel.code[operation.site])}"
    )
