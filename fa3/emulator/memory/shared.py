"""Shared memory of one CTA, ld.shared / st.shared, and what the checks want to know of them.

A shared address is an offset into the own CTA's memory, or, made by mapa, an offset with
the CTA's rank in the cluster + 1 in bits 24 and up.

In this package and in execution/ and matrix/, functions whose first parameters are (w, m) are
called by generated code: w is the Warpgroup, m the mask of executing lanes, None for all.
"""

from __future__ import annotations

import numpy as np

from ..checks import Checks, GenericWrites, ProxyClock, WrittenWords
from ..errors import BarrierMisuse, Misaligned, OutOfBounds, Unsupported
from ..races import Shadow

OFFSET = 0xFFFFFF
RANK_SHIFT = 24
MAX_CLUSTER = 16  # CTAs
_TYPES = (
    np.uint8,
    np.int8,
    np.uint16,
    np.int16,
    np.float16,
    np.uint32,
    np.int32,
    np.float32,
    np.uint64,
    np.int64,
    np.float64,
)


class SharedMemory:
    def __init__(self, nbytes: int, checks: Checks, clock: ProxyClock, races=None):
        padded = (nbytes + 1023) // 1024 * 1024
        self.size = nbytes
        self.raw = np.full(padded, 0xFF if checks.poison else 0, np.uint8)
        self.view = {t: self.raw.view(t) for t in _TYPES}
        self.chunks = self.raw.view(np.uint64).reshape(-1, 2)  # 16 bytes each
        self.barriers: dict = {}  # offset -> MBarrier
        self.written = WrittenWords(padded) if checks.uninit else None
        self.generic = GenericWrites(padded, clock) if checks.proxy else None
        self.races = races
        self.shadow = Shadow(padded) if races is not None else None

    def generic_read(self, w, m, addresses, nbytes: int) -> None:
        """Note a load of nbytes per active lane."""
        if self.written is not None:
            self.written.require(addresses, nbytes, "ld")
        if self.races is not None:
            threads = w.threads if m is None else w.threads[m]
            self.races.generic(self, addresses, nbytes, threads, writes=False)

    def generic_write(self, w, m, addresses, nbytes: int, raced: bool = True) -> None:
        """Note a store of nbytes per active lane through the generic proxy.

        raced: the check "race" has not seen it otherwise.
        """
        if w.checks.tracks_writes:
            self.note(w, addresses, nbytes, w.threads if m is None else w.threads[m], raced)

    def note(self, w, addresses, nbytes: int, threads, raced: bool = True) -> None:
        """Note stores of nbytes at addresses by threads (arrays of one shape)."""
        if raced and self.races is not None:
            self.races.generic(self, addresses, nbytes, threads, writes=True)
        if self.written is not None:
            self.written.mark(addresses, nbytes)
        if self.generic is not None:
            self.generic.record(addresses, nbytes, threads)
        if w.checks.mbarrier and self.barriers:
            low, high = int(addresses.min()) & ~7, int(addresses.max())
            near = {at for at in self.barriers if low <= at <= high}
            if near and (hit := near & set((addresses & ~7).ravel().tolist())):
                raise BarrierMisuse(
                    f"ordinary store over the mbarrier at {min(hit):#x} ({self.barriers[min(hit)]})"
                )

    def async_write(self, words) -> None:
        """Note that the async proxy wrote these 4-byte words."""
        if self.written is not None:
            self.written.words[words] = True
        if self.generic is not None:
            self.generic.forget(words)

    def async_read(self, words, what: str) -> None:
        """The async proxy is about to read these 4-byte words."""
        if self.written is not None:
            self.written.require_words(words, what)
        if self.generic is not None:
            self.generic.require_fenced(words, what)

    def async_read_chunks(self, chunks, what: str) -> None:
        """The same of 16-byte chunks, which are mostly as they should be."""
        written = self.written is None or self.written.words.reshape(-1, 4)[chunks].all()
        fenced = self.generic is None or not self.generic.time.reshape(-1, 4)[chunks].any()
        if not (written and fenced):
            self.async_read((chunks[..., None] * 4 + np.arange(4)).ravel(), what)

    @property
    def tracked(self) -> bool:
        """Whether async_read has anything to check."""
        return self.written is not None or self.generic is not None


def shared_at(w, address: int) -> tuple[SharedMemory, int]:
    """The memory a shared address points into, and the offset there."""
    rank = address >> RANK_SHIFT
    return (w.cluster.peer(rank) if rank else w.cta.smem), address & OFFSET


def locate(w, m, address, offset: int, nbytes: int) -> tuple[SharedMemory, np.ndarray]:
    """(memory, byte offsets of the active lanes), after bounds and alignment checks."""
    a = (w.active(address, m).astype(np.int64) + offset) & 0xFFFFFFFF
    memory = w.cta.smem
    if a.size == 0:
        return memory, a
    low, high = int(a.min()), int(a.max())
    if high >> RANK_SHIFT > MAX_CLUSTER:
        raise OutOfBounds(f"shared access at {high:#x}")
    if high >> RANK_SHIFT:
        if low >> RANK_SHIFT != high >> RANK_SHIFT:
            raise Unsupported("lanes addressing different CTAs in one instruction")
        memory = w.cluster.peer(high >> RANK_SHIFT)
        a = a & OFFSET
        low, high = low & OFFSET, high & OFFSET
    if nbytes > 1 and (a & (nbytes - 1)).any():
        bad = int(a[(a & (nbytes - 1)) != 0][0])
        raise Misaligned(f"{nbytes}-byte shared access at {bad:#x}")
    if high + nbytes > memory.size:
        raise OutOfBounds(f"shared access at {high:#x} outside the CTA's {memory.size:#x} bytes")
    return memory, a


def load(w, m, dtype, rows, address, offset):
    """ld.shared: rows are destination rows of one vector, None for elements not wanted."""
    es = np.dtype(dtype).itemsize
    memory, a = locate(w, m, address, offset, es * len(rows))
    if memory.written is not None or memory.races is not None:
        memory.generic_read(w, m, a, es * len(rows))
    index, array = a // es, memory.view[dtype]
    lanes = slice(None) if m is None else m
    for i, row in enumerate(rows):
        if row is not None:
            row[lanes] = array[index + i]


def store(w, m, dtype, rows, address, offset):
    """st.shared"""
    es = np.dtype(dtype).itemsize
    memory, a = locate(w, m, address, offset, es * len(rows))
    memory.generic_write(w, m, a, es * len(rows))
    index, array = a // es, memory.view[dtype]
    for i, row in enumerate(rows):
        array[index + i] = w.active(row, m)
