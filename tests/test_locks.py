"""Locks after a fork: a child can take what another thread of its parent held."""

import os
import threading
import warnings

import pytest

from fa3.locks import Lock

SECONDS = 30  # only a failure takes them

if not hasattr(os, "fork"):
    pytest.skip("no fork on this system", allow_module_level=True)


def in_child(question) -> bool:
    """What question() answers in a forked child; an error or no answer is False."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the threads at a fork
        child = os.fork()
    if child == 0:
        answer = []
        thread = threading.Thread(target=lambda: answer.append(question()), daemon=True)
        thread.start()
        thread.join(SECONDS)
        os._exit(0 if answer == [True] else 1)
    return os.waitpid(child, 0)[1] == 0


def taken(lock: Lock) -> bool:
    with lock:
        return True


def test_of_another_thread():
    forgotten, held, done = [], threading.Event(), threading.Event()
    lock = Lock(lambda: forgotten.append(1))

    def hold():
        with lock, lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(lambda: taken(lock) and forgotten == [1])
        assert forgotten == []
    finally:
        done.set()
        thread.join()
    assert taken(lock)


def test_that_is_free():
    forgotten = []
    lock = Lock(lambda: forgotten.append(1))
    assert in_child(lambda: taken(lock) and forgotten == [])


def test_of_the_thread_that_forks():
    """It goes on in the child, with its lock, which others there have to wait for."""
    lock = Lock()
    with lock:
        assert in_child(lambda: not lock._lock.acquire(blocking=False))
    assert taken(lock)
