"""Compilation on all cores, and how long it takes."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from ..variants import name_of
from .log import Log, of_failed

MOST_PROCESSES = 12  # each holds a compiler


def pool() -> ProcessPoolExecutor:
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2))
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def compile_one(number: int, signature, config) -> float:
    """Seconds; `number` is the place of its pass in the table. Runs in a process of the pool."""
    from .passes import PASSES

    start = time.monotonic()
    PASSES[number].compile(signature, config)
    return time.monotonic() - start


def build(log: Log, folder: Path) -> None:
    """Step: every kernel that a call can get, into the cache that all later steps use."""
    from .passes import PASSES

    with pool() as processes:
        jobs: dict[str, Future] = {}
        for number, row in enumerate(PASSES):
            for signature in row.signatures():
                arguments = number, signature, row.config(signature)
                name = f"{row.name} {name_of(signature)}"
                jobs[name] = processes.submit(compile_one, *arguments)
        for name, job in jobs.items():
            log.item(name, lambda job=job: {"compile_s": round(job.result(), 2)})


def first_calls(log: Log, folder: Path) -> None:
    """Step: the first call of a new process, with an empty cache and with a filled one."""
    from .passes import PASSES

    for number, row in enumerate(PASSES):
        for place, case in enumerate(row.first_calls):
            log.item(f"{row.name} {case}", lambda n=number, p=place: _first_call_twice(n, p))


def _first_call_twice(number: int, place: int) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "FA3_CACHE_DIR": cache}
        command = [sys.executable, "-m", __name__, str(number), str(place)]
        for name in ("cold", "warm"):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-300:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def _first_call(number: int, place: int) -> dict[str, float]:
    start = time.monotonic()
    import torch

    from .passes import PASSES

    row = PASSES[number]
    case = row.first_calls[place]
    inputs = case.inputs("cuda")
    torch.cuda.synchronize()
    times = {"import_s": time.monotonic() - start}
    for name in ("first_call_s", "second_call_s"):
        start = time.monotonic()
        row.call(case, inputs)
        torch.cuda.synchronize()
        times[name] = time.monotonic() - start
    return {name: round(seconds, 6) for name, seconds in times.items()}


def summarise_build(items: list[dict], folder: Path) -> tuple[bool, str]:
    times = [item["compile_s"] for item in items if "compile_s" in item]
    slowest = f", the slowest in {max(times)} s" if times else ""
    bad = of_failed(items)
    return bool(times) and not bad, "\n".join([f"{len(times)} kernels compiled{slowest}", *bad])


def summarise_first_calls(items: list[dict], folder: Path) -> tuple[bool, str]:
    bad = of_failed(items)
    lines = []
    for item in (item for item in items if "error" not in item):
        cold, warm = item["cold"]["first_call_s"], item["warm"]["first_call_s"]
        lines.append(f"{item['item']}: first call {cold:.2f} s cold, {warm:.2f} s warm")
    return bool(items) and not bad, "\n".join([*lines, *bad])


if __name__ == "__main__":
    print(json.dumps(_first_call(*map(int, sys.argv[1:]))))
