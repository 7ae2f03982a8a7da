"""Compilation on all cores, and how long it takes."""

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from fa3 import warm
from fa3.launch import jit

from ..backends import BACKENDS
from ..cases import DTYPES, Case
from .log import Log, of_failed

MOST_PROCESSES = 14  # each holds a compiler
SHORT = 512  # queries and keys, at most, of the calls that only tell what they compile
JITTED = "fa4"  # the peer that compiles when it is called; it keeps the result on disk, too


def pool() -> ProcessPoolExecutor:
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2))
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def compile_one(number: int, signature, config) -> float:
    """Seconds; `number` is the place of its pass in the table. Runs in a process of the pool."""
    from .passes import PASSES

    return compile_key(PASSES[number].key(signature, config))


def compile_key(key: tuple) -> float:
    """Seconds; key: the arguments of jit.artifacts."""
    start = time.monotonic()
    jit.artifacts(*key)
    return time.monotonic() - start


def keys_of(row) -> dict[tuple, None]:
    """What a row's calls compile: arguments of jit.artifacts. Needs no GPU and launches nothing."""
    dry = copy.copy(row)
    dry.context = contextlib.nullcontext
    calls = [functools.partial(_call, dry, _short(case)) for case in row.cases]
    keys = [row.key(signature, row.config(signature)) for signature in row.signatures()]
    keys += [(*kernel[:3], kernel.arch) for kernel in warm.wanted(calls, row.target)]
    return dict.fromkeys(keys)


def _short(case: Case) -> Case:
    lengths = {"s_q": min(case.s_q, SHORT), "s_k": min(case.s_k, SHORT)}
    heads = {"h_q": case.h_q // case.h_k, "h_k": 1}
    return replace(case, batch=min(case.batch, 3), **lengths, **heads)


def _call(row, case: Case) -> None:
    row.call(case, row.inputs(case))


def build(log: Log, folder: Path) -> None:
    """Step: every kernel that a call of ours can get, into the cache that all later steps use."""
    from .passes import PASSES

    with pool() as processes:
        jobs: dict[tuple, Future] = {}
        names: dict[tuple, str] = {}
        for row in PASSES:
            for number, key in enumerate(keys_of(row)):
                if key not in jobs:
                    jobs[key] = processes.submit(compile_key, key)
                    names[key] = f"{row.name} {number}: {key[0].rpartition(':')[2]} {key[1]}"
        peers = {
            f"{JITTED} {case}": processes.submit(_call_peer, case) for case in _of_the_first_sweep()
        }
        for key, job in jobs.items():
            log.item(names[key], lambda job=job: {"compile_s": round(job.result(), 2)})
        for name, job in peers.items():
            log.item(name, lambda job=job: {"peer_s": round(job.result(), 2)})


def _of_the_first_sweep() -> list[Case]:
    """A short case of each kernel of a peer that it times."""
    from .speed import SHORTEST, first_cases

    of_peer = [c for c in first_cases() if JITTED in BACKENDS[c.of_pass]]
    return [c for c in of_peer if c.length == SHORTEST]


def _call_peer(case: Case) -> float:
    """Seconds. In a process of the pool; a peer that is absent or fails is the sweep's to tell."""
    start = time.monotonic()
    q, k, v = (torch.randn(case.shape, device="cuda").to(DTYPES[case.dtype]) for _ in range(3))
    with contextlib.suppress(Exception):
        BACKENDS[case.of_pass][JITTED](case, q, k, v)()
    torch.cuda.synchronize()
    return time.monotonic() - start


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
