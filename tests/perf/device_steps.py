"""Steps that misbehave, for the tests of the step runner."""

import os
import subprocess
import sys
import time

from perf.device import log as device_log

FOREVER = 600


def _note(folder, text):
    """What ran, in order, whoever killed it afterwards."""
    with (folder / "ran").open("a") as file:
        file.write(f"{text}\n")


def plain(log, folder):
    for name in "abc":
        log.item(name, lambda name=name: _note(folder, name) or {"value": name})


def raising(log, folder):
    for name in "abc":
        log.item(name, lambda name=name: {"value": 1 / (name != "b")})


def hanging(log, folder):
    for name in "abc":
        log.item(name, lambda name=name: {"slept": time.sleep(FOREVER * (name == "b"))})


def dying(log, folder):
    for name in "abc":
        log.item(name, lambda name=name: os._exit(9) if name == "b" else {})


def losing_the_context(log, folder):
    _note(folder, "process")
    lost = []
    device_log.context_is_lost = lambda: bool(lost)
    log.item("a", lambda: lost.append("by a") or {"value": 1})
    log.item("b", dict)


def losing_it_always(log, folder):
    _note(folder, "process")
    device_log.context_is_lost = lambda: True
    for i in range(100):
        log.item(str(i), dict)


def broken(log, folder):
    raise ImportError("no such thing")


def absent(log, folder):
    log.item("a", lambda: {"skip": "the tool is not installed"})


def slow_with_children(log, folder):
    log.item("a", dict)
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER})"])
    log.item("b", lambda: _note(folder, child.pid) or {"code": child.wait()})


def suite(log, folder):
    from perf.device import accuracy  # only here: the others begin at once

    accuracy.run(log, [str(folder / "test_sample.py")])
