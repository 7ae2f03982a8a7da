"""Checks "proxy" and "race" together: a barrier has to lead from a writer's fence.proxy.async to
the async proxy's read of what it wrote.

The PTX manual (memory consistency model, "Proxies") orders accesses of different proxies by a proxy
fence that itself lies between them; a fence that another lane may execute later does not.
"""

from __future__ import annotations

import numpy as np

_WARP = 32  # threads
_MANY = 50  # writes of a warp kept one by one


class UnfencedWrites:
    """Generic writes of each warp to shared memory that no fence of their thread has followed."""

    def __init__(self):
        self._of: dict[int, list[tuple]] = {}  # warp -> (shadow, words, their threads)

    def add(self, agent: int, shadow, words, threads) -> None:
        writes = self._of.setdefault(agent, [])
        writes.append((shadow, words, threads))
        if len(writes) > _MANY:
            writes[:] = _joined(writes)

    def fence(self, agent: int, threads, epoch: int) -> None:
        """These threads of a warp fence: notes the epoch at each word they wrote."""
        left = []
        for shadow, words, writers in self._of.pop(agent, ()):
            fenced = (
                np.isin(writers, threads) if len(threads) < _WARP else np.ones(len(words), bool)
            )
            shadow.fenced[words[fenced]] = epoch
            if not fenced.all():
                left.append((shadow, words[~fenced], writers[~fenced]))
        if left:
            self._of[agent] = left


def _joined(writes: list[tuple]) -> list[tuple]:
    """The same with one entry per memory, and the last writer of each word."""
    found = []
    for shadow in {id(x[0]): x[0] for x in writes}.values():
        words, threads = (
            np.concatenate([x[part][::-1] for x in reversed(writes) if x[0] is shadow])
            for part in (1, 2)
        )
        unique, first = np.unique(words, return_index=True)
        found.append((shadow, unique, threads[first]))
    return found
