"""The clusters of a launch spread over processes, where nobody can tell but by the clock.

A launch runs its first cluster itself, which lowers the code and tells how long one takes.  If it
pays, it forks then.  A child runs every n-th of the other clusters and reports on each: what it
wrote to global memory, what it adds to the statistics, for the check "global" its accesses.  The
launch takes the reports over in the order of the clusters.  A cluster that failed in a child is run
again by the launch, which so ends, errors included, as if there had been no children.

Clusters may depend on each other by atomics alone (anything else is what the check "global" finds),
so kernels with atomics on global memory are not spread.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import NamedTuple

import numpy as np

from ..errors import EmulatorError, Race
from ..lowering.memory import communicates
from ..memory.places import Access

WORTH = 1.0  # seconds of one core from which on forking pays
_CLOCKS = ("%clock", "%globaltimer")

Work = tuple[int, list]  # number of a cluster, positions of its CTAs


class Report(NamedTuple):
    """What a child tells of a cluster."""

    number: int
    failed: bool
    counts: dict[str, int]
    accesses: list[Access]
    values: list[np.ndarray | None]  # of the accesses that write: the bytes after the cluster
    built: list[tuple[int, bool]]  # segments that were lowered for it: pc, whether for all lanes


def run(launch, clusters: list[list]) -> dict:
    """Run the clusters, given by the positions of their CTAs; returns statistics."""
    first, *others = enumerate(clusters)
    tell = launch.progress or (lambda done, total: None)
    start = time.perf_counter()
    totals = Counter(launch.run_cluster(*first))
    processes, serial = _how_many(launch, len(others), time.perf_counter() - start)
    tell(1, len(clusters))
    if processes == 1:
        for work in others:
            totals.update(launch.run_cluster(*work))
            tell(work[0] + 1, len(clusters))
    else:
        with contextlib.closing(_spread(launch, others, processes)) as reports:
            for work, report in zip(others, reports, strict=True):
                totals.update(_taken_over(launch, report) or launch.run_cluster(*work))
                tell(work[0] + 1, len(clusters))
    return {**totals, "processes": processes, "serial": serial}


def _how_many(launch, clusters: int, seconds: float) -> tuple[int, str]:
    """(processes for this many clusters of so many seconds, the reason if it is one)"""
    wanted, forced = launch.processes, launch.processes is not None
    if wanted is None:
        wanted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    reasons = (
        (wanted == 1, "one process asked for" if forced else "one core"),
        (clusters < 2, "few clusters"),
        (not forced and seconds * clusters < WORTH, "short"),
        ("fork" not in multiprocessing.get_all_start_methods(), "no fork on this system"),
        (multiprocessing.current_process().daemon, "a process that may not have children"),
        (launch.schedule.trace is not None, "trace"),
        (launch.profile is not None, "profile"),
    )
    reason = next((why for holds, why in reasons if holds), "") or _ordered(launch.kernel)
    return (1, reason) if reason else (min(wanted, clusters), "")


def _ordered(kernel) -> str:
    """Why the clusters of a kernel must run one after another; "" if they need not."""
    if any(communicates(i) for i in kernel.code):
        return "atomics"
    if any(i.parts[0] == "call" for i in kernel.code):
        return "printf"
    if any(i.parts[0] == "tensormap" for i in kernel.code):
        return "tensor maps are written"
    if any(clock in i.text for i in kernel.code for clock in _CLOCKS):
        return "clock"
    return ""


# the launch


def _spread(launch, others: list[Work], count: int) -> Iterator[Report]:
    """The reports on all clusters, in order, of children that run them."""
    children, receivers = [], []
    fork = multiprocessing.get_context("fork")
    try:
        for i in range(count):
            receiver, sender = fork.Pipe(duplex=False)
            receivers.append(receiver)
            given = launch, others[i::count], sender, tuple(receivers)
            child = fork.Process(target=_child, args=given, daemon=True)
            with warnings.catch_warnings():
                # of threads at a fork: those of torch; a child uses numpy alone, whose BLAS copes
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            sender.close()
            children.append(child)
        yield from _in_order(dict(zip(receivers, children, strict=True)), others)
    finally:
        for child in children:
            child.kill()
            child.join()
        for receiver in receivers:
            receiver.close()


def _in_order(children: dict, others: list[Work]) -> Iterator[Report]:
    waiting: dict[int, Report] = {}
    for number, _ in others:
        while number not in waiting:
            for receiver in connection.wait(list(children)):
                try:
                    report = receiver.recv()
                except (EOFError, OSError):
                    _require_finished(children.pop(receiver))
                else:
                    waiting[report.number] = report
        yield waiting.pop(number)


def _require_finished(child) -> None:
    child.join()
    if child.exitcode:
        how = f"signal {-child.exitcode}" if child.exitcode < 0 else f"code {child.exitcode}"
        raise EmulatorError(
            f"a process that ran clusters of the launch ended with {how}: out of memory? "
            "options(processes=1) runs them in this one"
        )


def _taken_over(launch, report: Report) -> dict[str, int] | None:
    """What a cluster adds to the statistics; None if it has to be run here."""
    for key in report.built:  # so that the next launch has them before it forks
        launch.lowered.segment(*key)
    if report.failed:
        return None
    try:
        for access in report.accesses if launch.read_observer is not None else ():
            launch.read_observer.note(report.number, access)
    except Race:
        return None
    for access, values in zip(report.accesses, report.values, strict=True):
        if values is not None:
            access.where.put(launch.memory.find(access.start, access.start + 1).bytes, values)
    return report.counts


# a child


class _Journal:
    """An observer that keeps the accesses of a cluster."""

    order = None

    def __init__(self, lowered):
        self._lowered = lowered
        self.accesses: list[tuple] = []  # region, Access

    def access(
        self, w, region, where, writes: bool, site: int | None = None, operation=None
    ) -> None:
        pc = self._lowered.pc_here() if site is None else site
        access = Access(region.start, len(region.bytes), where, writes, pc)
        self.accesses.append((region, access))

    def fence(self, w, lanes) -> None:
        """Kernels whose clusters communicate are not spread."""


def _child(launch, share: Iterable[Work], sender, receivers) -> None:
    """Run a share of the clusters, leave at once: nothing of the parent's is to be cleaned up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent ends its children, or the terminal
    for receiver in receivers:  # so that a send fails when the parent is gone
        receiver.close()
    with contextlib.suppress(BrokenPipeError):
        for number, positions in share:
            sender.send(_report(launch, number, positions))
    os._exit(0)


def _report(launch, number: int, positions: list) -> Report:
    lowered, known = launch.lowered, launch.lowered.keys()
    journal = _Journal(lowered)
    launch.observe(journal, reads=launch.checks.across)
    try:
        counts, failed = launch.run_cluster(number, positions), False
    except Exception:  # noqa: BLE001 - the parent meets it again
        counts, failed = {}, True
    values = [a.where.of(r.bytes).copy() if a.writes else None for r, a in journal.accesses]
    accesses = [access for _, access in journal.accesses]
    return Report(number, failed, counts, accesses, values, list(lowered.keys() - known))
