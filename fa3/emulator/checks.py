"""The optional checks: which are on, and what each has to remember (see settings.CHECKS).

SharedMemory and Warpgroup own the trackers; None stands for a check that is off.
"""

from __future__ import annotations

import numpy as np

from .errors import MissingProxyFence, Uninitialized

MAX_THREADS = 16 * 1024  # of a cluster: 16 CTAs of 1024 threads


class Checks:
    """One boolean per check."""

    def __init__(self, on: tuple[str, ...] = ()):
        self.proxy = "proxy" in on
        self.uninit = "uninit" in on
        self.poison = "poison" in on
        self.wgmma = "wgmma" in on
        self.fence = "fence" in on
        self.late = "late" in on
        self.mbarrier = "mbarrier" in on
        self.box = "box" in on
        self.race = "race" in on
        self.across = "global" in on
        self.sums = "sums" in on
        self.tracks_writes = self.proxy or self.uninit or self.mbarrier or self.race


class WrittenWords:
    """Which 4-byte words of shared memory were ever written."""

    def __init__(self, nbytes: int):
        self.words = np.zeros(nbytes // 4, bool)

    def mark(self, addresses, nbytes: int) -> None:
        for b in range(0, nbytes, 4):
            self.words[(addresses + b) >> 2] = True

    def require(self, addresses, nbytes: int, what: str) -> None:
        for b in range(0, nbytes, 4):
            words = (addresses + b) >> 2
            self.require_words(words, what)

    def require_words(self, words, what: str) -> None:
        seen = self.words[words]
        if not seen.all():
            missing = words[~seen]
            run = bytes_of(int(missing.flat[0]), missing)
            raise Uninitialized(f"{what} reads uninitialised shared memory at {run}")


class ProxyClock:
    """When each thread of a cluster last executed fence.proxy.async, in generic writes."""

    def __init__(self, lowered):
        self.lowered = lowered
        self.now = 0
        self.fenced = np.zeros(MAX_THREADS, np.int64)

    def fence(self, threads) -> None:
        self.fenced[threads] = self.now


class GenericWrites:
    """Who last wrote each word of shared memory through the generic proxy, and when."""

    def __init__(self, nbytes: int, clock: ProxyClock):
        self.clock = clock
        self.time = np.zeros(nbytes // 4, np.int64)
        self.thread = np.zeros(nbytes // 4, np.int32)
        self.lowered, self.site = clock.lowered, np.zeros(nbytes // 4, np.int32)

    def record(self, addresses, nbytes: int, threads) -> None:
        self.clock.now += 1
        site = self.lowered.pc_here()
        for b in range(0, nbytes, 4):
            words = (addresses + b) >> 2
            self.time[words] = self.clock.now
            self.thread[words] = threads
            self.site[words] = site

    def forget(self, words) -> None:
        """The async proxy wrote these words."""
        self.time[words] = 0

    def require_fenced(self, words, what: str) -> None:
        """The async proxy reads these words: their writers must have fenced since."""
        bad = self.time[words] > self.clock.fenced[self.thread[words]]
        if bad.any():
            word = int(words[bad].flat[0])
            place = bytes_of(word, words[bad & (self.site[words] == self.site[word])])
            raise MissingProxyFence(
                f"{what} reads shared memory at {place}, written through the generic proxy by "
                f"thread {int(self.thread[word]) % 1024}, without fence.proxy.async since "
                f"{self.lowered.place(int(self.site[word]))}"
            )


def bytes_of(first: int, words, size: int = 4) -> str:
    """ "0x80..0xff": the bytes of a word of `size` bytes and of those of `words` that follow it."""
    following = np.unique(words)
    following = following[np.searchsorted(following, first) :]
    run = following - np.arange(len(following)) == first
    return f"{first * size:#x}..{(first + int(run.sum())) * size - 1:#x}"
