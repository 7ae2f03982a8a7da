"""Questions to a forked child."""

import os
import threading
import traceback
import warnings

import pytest

SECONDS = 60  # only a failure takes them


def in_child(question) -> bool:
    """What question() answers in a forked child; an error or no answer is False."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the threads at a fork
        child = os.fork()
    if child == 0:
        threading.Timer(SECONDS, os._exit, (1,)).start()
        try:
            os._exit(0 if question() is True else 1)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
