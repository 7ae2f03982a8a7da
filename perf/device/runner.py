"""Run steps one after the other, each in its own process and under its own time limit."""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .log import FRESH, Log

ROOT = Path(__file__).resolve().parents[2]
CACHE = "cache"  # folder of the compiled kernels; it stays out of the archive
TICK = 0.1  # seconds between two looks at a process
DYING = 10.0  # seconds that a killed process may take: one that waits for a hung GPU can take long
LEAST = 5.0  # seconds of budget below which no step is begun
MOST_PROCESSES = 9  # of one step: where every item breaks its process, more of them teach nothing
FINISHED = ("ok", "bad", "skipped")

Summarise = Callable[
    [list[dict], Path], tuple[bool, str]
]  # (items, folder) -> as it should be, text


@dataclass(frozen=True)
class Step:
    """A row of the table."""

    name: str
    what: str
    work: str  # "module:function", called as function(log, folder)
    limit: float  # seconds in all
    patience: float  # seconds for one item
    summarise: Summarise


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    status: ok; bad (ran to its end, but something is not as it should be); skipped (cannot be done
    here); failed (its process broke); timed out; not run (no budget left).
    """

    status: str
    text: str
    seconds: float = 0.0
    date: str = ""


def run(
    steps: Iterable[Step],
    folder: Path,
    budget: float = float("inf"),
    commit: str = "unknown",
    again: bool = False,
    archive: Path | None = None,
) -> dict[str, Outcome]:
    """Run what `folder` does not hold yet; the outcomes of all of `steps`, in their order.

    Raises:
        ValueError: the folder holds the results of another commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget
    known = _read(folder, commit)
    outcomes = {}
    for step in steps:
        if again:
            known.pop(step.name, None)
            (folder / f"{step.name}.jsonl").unlink(missing_ok=True)
        before = known.get(step.name)
        if before is None or before.status not in FINISHED:
            left = deadline - time.monotonic()
            if left < LEAST:
                outcomes[step.name] = Outcome("not run", "no budget left")
                continue
            print(f"perf.device: {step.name}: {step.what}", flush=True)
            known[step.name] = run_step(step, folder, min(step.limit, left), commit)
            _write(folder, commit, known)
            if archive is not None:
                pack(folder, archive)
        outcomes[step.name] = known[step.name]
    return outcomes


def run_step(step: Step, folder: Path, limit: float, commit: str = "unknown") -> Outcome:
    """Processes for one step until its items are done, or `limit` seconds have passed.

    A process that hangs or dies in an item is replaced; the item's line says what happened.
    """
    start = time.monotonic()
    log = Log(folder / f"{step.name}.jsonl")
    status, processes = "", 0
    while not status:
        processes += 1
        done = len(log.ended())
        code = _process(step, folder, log, start + limit, commit)
        item = log.open()
        if code == "limit":
            status, text = "timed out", f"after {limit:.0f} s"
        elif item is not None:
            ending = f"nothing for {step.patience:g} s" if code == "hung" else f"exit code {code}"
            log.end(item, error=f"its process ended: {ending}")
        elif code in (FRESH, "hung") and len(log.ended()) > done:
            pass
        elif code != 0:
            status, text = "failed", f"exit code {code}, see {step.name}.log"
        else:
            status = "ended"
        if not status and processes == MOST_PROCESSES:
            status, text = "failed", f"{processes} processes broke"
    found, summary = _summarise(step, log.ended(), folder)
    if status == "ended":
        status, text = found, summary
    elif summary:
        text = f"{text}; so far: {summary}"
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    return Outcome(status, text, round(time.monotonic() - start, 1), now)


def _summarise(step: Step, items: list[dict], folder: Path) -> tuple[str, str]:
    if items and all("skip" in item for item in items):
        return "skipped", items[0]["skip"]
    try:
        good, text = step.summarise([item for item in items if "skip" not in item], folder)
    except Exception as error:  # of a step that left less than its summary needs
        return "failed", f"no summary: {type(error).__name__}: {error}"
    return "ok" if good else "bad", text


def _process(step: Step, folder: Path, log: Log, deadline: float, commit: str) -> int | str:
    """One process of a step: its exit code, "hung" or "limit"."""
    command = [sys.executable, "-m", "perf.device.worker", step.work, str(folder), step.name]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FA3_COMMIT": commit}
    environment["FA3_CACHE_DIR"] = str(folder / CACHE)
    environment.pop("FA3_CPU", None)
    environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"  # of a peer, which compiles, too
    environment["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(folder / CACHE / "fa4")
    with (folder / f"{step.name}.log").open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # so that what it starts ends with it
        )
    try:
        size, moved = -1, time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            grown = log.path.stat().st_size if log.path.is_file() else 0
            if grown != size:
                size, moved = grown, now
            if now > deadline:
                return "limit"
            if now - moved > step.patience and log.open() is not None:
                return "hung"
            time.sleep(TICK)
        return process.returncode
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DYING)


def _read(folder: Path, commit: str) -> dict[str, Outcome]:
    path = folder / "steps.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if content["commit"] != commit:
        raise ValueError(
            f"{folder} holds results of commit {content['commit']}, this is {commit}: "
            "take another folder"
        )
    return {name: Outcome(**outcome) for name, outcome in content["steps"].items()}


def _write(folder: Path, commit: str, known: dict[str, Outcome]) -> None:
    steps = {name: asdict(outcome) for name, outcome in known.items()}
    fresh = folder / "steps.json.new"
    fresh.write_text(json.dumps({"commit": commit, "steps": steps}, indent=1) + "\n")
    os.replace(fresh, folder / "steps.json")


def pack(folder: Path, archive: Path) -> None:
    """All results in one file; in place as a whole."""
    fresh = archive.with_name(archive.name + ".new")
    with tarfile.open(fresh, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            if path.name != CACHE and path.resolve() not in (fresh.resolve(), archive.resolve()):
                tar.add(path, arcname=path.name)
    os.replace(fresh, archive)


def screen(outcomes: dict[str, Outcome]) -> str:
    """A line per step, further lines of a text below it."""
    wide = max(map(len, outcomes), default=0)
    lines = []
    for name, outcome in outcomes.items():
        first, *more = outcome.text.splitlines() or [""]
        lines.append(f"{name:<{wide}}  {outcome.status:<9} {outcome.seconds:>6.1f} s  {first}")
        lines += [f"{'':<{wide}}  {line}" for line in more]
    return "\n".join(lines)
