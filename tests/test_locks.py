"""Locks after a fork: a child can take what another thread of its parent held."""

import threading

from fa3.launch.locks import Lock

from .forks import in_child


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

    def question():
        found = []
        other = threading.Thread(target=lambda: found.append(lock._lock.acquire(blocking=False)))
        other.start()
        other.join()
        return taken(lock) and found == [False]

    with lock:
        assert in_child(question)
    assert taken(lock)
