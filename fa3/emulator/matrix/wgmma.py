"""wgmma: a warpgroup multiplies 64 x K by K x N and accumulates in registers.

Accumulator fragment: D[16 w + 8 h + g, 8 j + 2 q + p] is in lane 32 w + 4 g + q,
element 4 j + 2 h + p.

MMAs are collected, at most until their commit_group (or, as the schedule says, up to the
wait_group that covers them), and then executed in order; those of one accumulator that follow each
other become one matrix product.  Compilers do read accumulators before the commit (moves of packed
halves, which ptxas orders): generated code calls flush() before it touches a register of an issued
MMA.

Floating-point products accumulate in fp32 in the order of BLAS, where the hardware truncates; for
FP8, where that is noticeable, options(accumulator="short") does as the hardware does.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ..errors import KernelError, OutOfBounds
from ..memory.operations import Operation
from ..numerics import short_sum
from ..numerics.formats import FP8, f2, high_half, join_halves, low_half
from . import descriptors
from .elements import ELEMENT, decode

ROWS = 64


@dataclass(eq=False)
class Shape:
    """What is fixed about one wgmma instruction."""

    n: int
    k: int
    types: tuple[str, str, str]  # D, A, B
    transposed: tuple[bool, bool]  # A, B are MN-major
    negated: bool  # scale-a * scale-b is -1
    saturates: bool  # integer sums stop at the ends of their range
    accumulator: slice | np.ndarray  # rows of 32-bit registers
    a_registers: np.ndarray | None  # None: A is in shared memory
    registers: tuple[frozenset, frozenset]  # accumulator and A, for the check
    site: int  # pc

    def key(self):
        """Instructions of equal key that follow each other may be joined along K."""
        return (
            self.n,
            self.types,
            self.transposed,
            self.negated,
            self.saturates,
            self.registers[0],
            self.a_registers is None,
        )


class Issued(NamedTuple):
    shape: Shape
    a: int | None  # descriptors
    b: int
    accumulate: bool


class Queue:
    """The wgmmas of one warpgroup."""

    def __init__(self, w):
        self.w = w
        self.issued: list[Issued] = []
        self.group: list[Issued] = []  # since the last commit, for the check "race"
        self.committed: list[Operation] = []  # groups, oldest first
        self.deferred = w.launch.schedule.defers

    def flush(self) -> None:
        """Execute what was issued, unless that is to happen later."""
        if self.issued and not self.deferred:
            issued, self.issued = self.issued, []
            self._execute(issued)

    def commit(self) -> None:
        self.flush()
        if not self.w.groups_kept:
            return
        issued, self.issued = self.issued, []
        site = issued[0].shape.site if issued else self.w.current.pc
        work = partial(self._execute, issued)
        spans = self._spans(issued) if self.w.launch.schedule.trace is not None else []
        group = Operation(self.w, site, self.w.live, "wgmma", spans, work, self._raced())
        group.queue = self.committed
        self.committed.append(group)
        self.w.cluster.issue(group, waited_for=True)

    def wait(self, keep: int) -> None:
        done = self.committed[: max(0, len(self.committed) - keep)]
        for group in done:
            group.complete()
            if self.w.races is not None:
                self.w.races.acquire(self.w.races.agents(self.w, self.w.live), group.clock)
        del self.committed[: len(done)]

    def _raced(self) -> np.ndarray | None:
        """Check "race": the clock of the group that is being committed."""
        w, group = self.w, self.group
        if w.races is None or not group:
            return None
        self.group = []
        words = _words_read(tuple(group))
        site = group[0].shape.site
        access = w.races.begin(w, w.live, "wgmma", "wgmma", site)
        try:
            if words[-1] < len(w.cta.smem.shadow.writes):  # otherwise the product will complain
                w.races.read(w.cta.smem.shadow, words, access)
        except KernelError as error:
            error.site = site
            raise
        return access.clock

    def _spans(self, issued: list[Issued]) -> list[tuple]:
        """The bytes from the first to the last of each operand."""
        spans = []
        for i in issued:
            for chunks in operands(i):
                low, high = int(chunks.min()), int(chunks.max()) + 1
                size = descriptors.CHUNK
                spans.append((self.w.cta.smem, low * size, high * size, False))
        return spans

    def _execute(self, issued: list[Issued]) -> None:
        for _, same in itertools.groupby(issued, lambda i: i.shape.key()):
            run: list[Issued] = []
            for i in same:
                if run and (not i.accumulate or i.shape.saturates):  # starts afresh
                    _multiply(self.w, run)
                    run = []
                run.append(i)
            _multiply(self.w, run)


def operands(issued: Issued) -> list[np.ndarray]:
    """Indices of the 16-byte chunks of shared memory that one wgmma reads, by operand."""
    shape, found = issued.shape, []
    for desc, rows, kind, mn_major in (
        (issued.b, shape.n, shape.types[2], shape.transposed[1]),
        (issued.a, ROWS, shape.types[1], shape.transposed[0]),
    ):
        if desc is not None:
            found.append(descriptors.chunks((desc,), rows, ELEMENT[kind][0], mn_major))
    return found


@functools.lru_cache(4096)
def _words_read(group: tuple[Issued, ...]) -> np.ndarray:
    """Indices of the 4-byte words of shared memory that a group reads."""
    chunks = np.unique(np.concatenate([c.ravel() for i in group for c in operands(i)]))
    return (chunks[:, None] * 4 + np.arange(4)).ravel()


def issue(w, shape: Shape, a, b, accumulate):
    """wgmma.mma_async; a and b are rows with descriptors (a None: registers)."""
    if w.registers is not None:
        form = shape.n, shape.k, shape.types[0]
        w.registers.issue(*shape.registers, form, w.launch.lowered, shape.site)
    issued = Issued(
        shape,
        None if a is None else int(a[0]),
        int(b[0]),
        accumulate if isinstance(accumulate, bool) else bool(accumulate[0]),
    )
    w.wgmma.issued.append(issued)
    if w.races is not None:
        w.wgmma.group.append(issued)


def fence(w):
    if w.registers is not None:
        w.registers.fence()


def commit(w):
    w.wgmma.commit()
    if w.registers is not None:
        w.registers.commit()


def wait(w, keep):
    w.wgmma.wait(keep)
    if w.registers is not None:
        w.registers.wait(keep)


def _multiply(w, run: list[Issued]) -> None:
    shape = run[0].shape
    try:
        b = _from_memory(w, [i.b for i in run], shape.n, shape.types[2], shape.transposed[1], "B")
        if shape.a_registers is None:
            a = _from_memory(w, [i.a for i in run], ROWS, shape.types[1], shape.transposed[0], "A")
        else:
            a = np.hstack([_from_registers(w, i.shape) for i in run])
    except KernelError as error:
        error.site = shape.site
        raise
    if shape.negated:
        a = -a
    if w.launch.accumulator == "short" and shape.types[1] in FP8:
        _accumulate_shortly(w, shape, a, np.ascontiguousarray(b.T), run[0].accumulate)
    else:
        _accumulate(w, shape, a @ b.T, run[0].accumulate)


def _from_memory(w, descs, rows, kind, mn_major, name) -> np.ndarray:
    """(rows, K) values of an operand."""
    es, dtype = ELEMENT[kind]
    smem = w.cta.smem
    chunks = descriptors.chunks(tuple(descs), rows, es, mn_major)
    try:
        x = smem.chunks[chunks]
    except IndexError:
        raise OutOfBounds(f"wgmma operand {name} reaches outside shared memory") from None
    if smem.tracked:
        smem.async_read_chunks(chunks, f"wgmma operand {name}")
    x = x.reshape(len(chunks), -1).view(dtype)
    return decode(x.T if mn_major else x, kind)


def _from_registers(w, shape: Shape) -> np.ndarray:
    """The 64 x K matrix A held in registers."""
    es, dtype = ELEMENT[shape.types[1]]
    x = np.ascontiguousarray(w.words[shape.a_registers].T).view(dtype)
    # lane (warp, g, q), register (k half, row half), element in it
    x = x.reshape(4, 8, 4, 2, 2, 4 // es).transpose(0, 4, 1, 3, 2, 5)
    return decode(x.reshape(ROWS, shape.k), shape.types[1])


def _fragments(product) -> np.ndarray:
    """(64, N) -> (N / 2 elements, 128 lanes)"""
    n = product.shape[1]
    return product.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, 128)


def _matrix(elements) -> np.ndarray:
    """The inverse of _fragments."""
    n = 2 * len(elements)
    return elements.reshape(n // 8, 2, 2, 4, 8, 4).transpose(3, 1, 4, 0, 5, 2).reshape(ROWS, n)


def _accumulate(w, shape: Shape, product, keep: bool) -> None:
    acc, c = shape.accumulator, _fragments(product)
    if shape.types[0] == "f32":
        w.floats[acc] = w.floats[acc] + c if keep else c
    elif shape.types[0] == "f16":
        if keep:
            old = w.words[acc]
            c[0::2] += low_half(old).view(f2)
            c[1::2] += high_half(old).view(f2)
        h = c.astype(f2).view(np.uint16)
        w.words[acc] = join_halves(h[0::2], h[1::2])
    else:
        total = c.astype(np.int64)
        if keep:
            total += w.ints[acc]
        if shape.saturates:
            total = np.clip(total, -(2**31), 2**31 - 1)
        w.words[acc] = total.astype(np.uint32)


def _accumulate_shortly(w, shape: Shape, a, b, keep: bool) -> None:
    """options(accumulator="short"): the steps of K one after another; a is (64, K), b (K, N)."""
    halves, acc = shape.types[0] == "f16", shape.accumulator
    c = np.zeros((ROWS, shape.n), np.float32)
    if keep and halves:
        old = w.words[acc]
        both = np.stack([low_half(old).view(f2), high_half(old).view(f2)], 1)
        c = _matrix(both.reshape(-1, 128)).astype(np.float32)
    elif keep:
        c = _matrix(w.floats[acc])
    for i in range(0, len(b), short_sum.K):
        step = slice(i, i + short_sum.K)
        c = short_sum.add_products(np.ascontiguousarray(c), a[:, step], b[step], shape.types)
    c = _fragments(c)
    if halves:
        h = c.astype(f2).view(np.uint16)
        w.words[acc] = join_halves(h[0::2], h[1::2])
    else:
        w.floats[acc] = c
