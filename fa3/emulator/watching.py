"""Values of a kernel's variables, thread by thread, for bugs in the arithmetic that no check sees.

In a kernel, `emulator.watch("acc", acc)` prints with a mark, and the emulator keeps what has the
mark instead of printing it: `emulator.watched["acc"]`. On a GPU the same code prints.
"""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np

_MARK = "@watch "
_LINE = re.compile(rf"{_MARK}(?P<name>\S+) (?P<index>\d+) (?P<value>\S+)\n*")


def watch(name: str, value) -> None:
    """Called in a kernel: keep a number, or each element of a tensor of static size.

    name: without spaces. Tensors in registers have the elements of a thread, others the same ones
    for all threads that come by.

    Raises ValueError for a name with spaces or a percent sign.
    """
    import cutlass
    import cutlass.cute as cute

    if not re.fullmatch(r"[^\s%{}]+", name):
        raise ValueError(f"name is {name!r}, expected one without spaces, percent signs, braces")
    is_tensor = hasattr(value, "layout")
    elements = [value[i] for i in range(cute.size(value))] if is_tensor else [value]
    for i, element in enumerate(elements):
        cute.printf(f"{_MARK}{name} %d %.9g", cutlass.Int32(i), cutlass.Float32(element))


class Values:
    """Of one name, in the last launch."""

    def __init__(self):
        self._seen: dict = defaultdict(list)  # (cta, thread, index) -> values, in order

    def add(self, cta: tuple, thread: int, index: int, value: float) -> None:
        self._seen[cta, thread, index].append(value)

    def of(self, cta: tuple[int, int, int] = (0, 0, 0), time: int = -1) -> np.ndarray:
        """(threads, elements) of a CTA, NaN where there is none.

        time: which value, where a thread came by several times: 0 the first, -1 the last.
        """
        mine = {key[1:]: values for key, values in self._seen.items() if key[0] == cta}
        shape = [1 + max((key[axis] for key in mine), default=-1) for axis in (0, 1)]
        found = np.full(shape, np.nan)
        for place, values in mine.items():
            if -len(values) <= time < len(values):
                found[place] = values[time]
        return found


class Watched(dict):
    """The values of the last launch, by name."""

    def __missing__(self, name: str) -> Values:
        raise KeyError(f"{name!r} was not watched in the last launch, but {sorted(self)}")

    def takes(self, cta: tuple, thread: int, text: str) -> bool:
        """Whether what a thread prints is for here; then it is kept."""
        found = _LINE.fullmatch(text)
        if found is None:
            return False
        values = self.setdefault(found["name"], Values())
        values.add(tuple(cta), thread, int(found["index"]), float(found["value"]))
        return True


watched = Watched()
