"""Commit groups of asynchronous work: what late mode has not executed yet."""

from __future__ import annotations

from collections.abc import Callable, Hashable


class Groups:
    """Per owner (a lane, a warp, a warpgroup): an open group and committed ones, oldest first."""

    def __init__(self):
        self._open: dict[Hashable, list[Callable[[], None]]] = {}
        self._committed: dict[Hashable, list[list[Callable[[], None]]]] = {}

    def add(self, owner: Hashable, work: Callable[[], None]) -> None:
        self._open.setdefault(owner, []).append(work)

    def commit(self, owner: Hashable) -> None:
        self._committed.setdefault(owner, []).append(self._open.pop(owner, []))

    def drain(self, owner: Hashable, keep: int) -> None:
        """Execute all but the `keep` youngest committed groups."""
        groups = self._committed.get(owner, [])
        done = groups[: max(0, len(groups) - keep)]
        del groups[: len(done)]
        for group in done:
            for work in group:
                work()
