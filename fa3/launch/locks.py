"""A lock that forked children can take, whatever the other threads of their parent were doing.

Imports the standard library alone, so that the emulator may import it.
"""

import os
import threading
import weakref
from collections.abc import Callable


class Lock:
    """A re-entrant lock, for `with`.

    A child has only the thread that forked: what another one held would be locked for ever there.
    In the child such a lock is free again.
    """

    _all: weakref.WeakSet = weakref.WeakSet()

    def __init__(self, forget: Callable[[], None] = lambda: None):
        """forget: called in a child where another thread left what the lock guards half done."""
        self._lock = threading.RLock()
        self._forget = forget
        self._all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_) -> None:
        self._lock.release()

    def _renew(self) -> None:
        if self._lock.acquire(blocking=False):  # free, or held by this thread
            self._lock.release()
            return
        self._lock = threading.RLock()
        self._forget()

    @classmethod
    def renew_all(cls) -> None:
        for lock in list(cls._all):
            lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Lock.renew_all)
