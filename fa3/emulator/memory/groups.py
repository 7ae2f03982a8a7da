"""Commit groups of asynchronous operations."""

from __future__ import annotations

from collections.abc import Hashable

from .operations import Operation


class Groups:
    """Per owner (a lane, a warp): an open group and committed ones, oldest first."""

    def __init__(self):
        self._open: dict[Hashable, list[Operation]] = {}
        self._committed: dict[Hashable, list[list[Operation]]] = {}

    def add(self, owner: Hashable, operation: Operation) -> None:
        self._open.setdefault(owner, []).append(operation)

    def commit(self, owner: Hashable) -> None:
        self._committed.setdefault(owner, []).append(self._open.pop(owner, []))

    def drain(self, owner: Hashable, keep: int) -> list[Operation]:
        """Complete all but the `keep` youngest committed groups; returns their operations."""
        groups = self._committed.get(owner)
        if not groups:
            return []
        done = groups[: max(0, len(groups) - keep)]
        del groups[: len(done)]
        operations = [operation for group in done for operation in group]
        for operation in operations:
            operation.complete()
        return operations
