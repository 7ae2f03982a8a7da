"""Where in global memory an access lies, for those who observe accesses.

An observer has
    order                       whether it asks which warps did something (device_order.py), or None
    access(w, region, where, writes, site=None, operation=None)
                                a plain access; site: pc of its instruction; operation: see observe
    synchronise(w, lanes, addresses, acquires, releases)
                                an atomic, or an access that counts as one
    fence(w, lanes)             one for the whole GPU
    add(w, region, words, operation)
                                an addition to fp words, with the check "sums"
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Bytes of a region: elements of `width` bytes in a strided box; all in bytes but the shape."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    width: int

    def of(self, cells: np.ndarray) -> np.ndarray:
        """The cells, one per byte of the region, that belong to these bytes."""
        es = cells.itemsize
        strides = tuple(x * es for x in (*self.strides, 1))
        return np.ndarray((*self.shape, self.width), cells.dtype, cells, self.offset * es, strides)

    def put(self, cells: np.ndarray, values) -> None:
        self.of(cells)[...] = values

    def flat(self) -> np.ndarray:
        """The offsets of the bytes in the region."""
        at = np.array([self.offset])
        for count, stride in zip((*self.shape, self.width), (*self.strides, 1), strict=True):
            at = (at[:, None] + np.arange(count) * stride).ravel()
        return at


class Indices(NamedTuple):
    """Single bytes of a region."""

    at: np.ndarray

    def of(self, cells: np.ndarray) -> np.ndarray:
        return cells[self.at]

    def put(self, cells: np.ndarray, values) -> None:
        cells[self.at] = values

    def flat(self) -> np.ndarray:
        return self.at


Place = Window | Indices


class Access(NamedTuple):
    """A plain access of the instruction at pc, to a region of global memory."""

    start: int  # of the region: address
    nbytes: int  # of the region
    where: Place
    writes: bool
    pc: int


def observe(w, region, where: Place, writes: bool, site: int, operation=None) -> None:
    """Tell the launch of an access, and the cluster, to which of its operations it belongs.

    operation: a races.Access, None if the check "race" is off.
    """
    observer = w.launch.write_observer if writes else w.launch.read_observer
    if observer is not None:
        observer.access(w, region, where, writes=writes, site=site, operation=operation)
    if operation is not None and w.cluster.global_races is not None:
        w.cluster.global_races.access(region, where, writes, operation)


def observe_sum(w, region, where: Place, operation) -> None:
    """Tell of an addition of numbers whose sum depends on the order."""
    if w.checks.sums and w.launch.write_observer is not None:
        w.launch.write_observer.add(w, region, np.unique(where.flat() >> 2), operation)


def indices(offsets, nbytes: int) -> Indices:
    """nbytes from each of these offsets into a region."""
    return Indices((np.asarray(offsets)[:, None] + np.arange(nbytes)).ravel())


def span(offset: int, nbytes: int) -> Window:
    return Window(offset, (nbytes,), (1,), 1)
