"""Steps: a few cases of every pass beside fp32; the tests on the GPU, a line per test.

The process that replaces one in which a test hung or lost the CUDA context goes on with the tests
that have no line yet.
"""

from pathlib import Path

import pytest

from . import log as of_step
from .exact import judged
from .log import FRESH, Log, of_failed


class Recorder:
    """A pytest plugin: leaves out what the log holds, and writes what every other test did."""

    def __init__(self, log: Log):
        self._log = log
        self._outcome: dict = {}

    def pytest_collection_modifyitems(self, config, items):
        known = {line["item"] for line in self._log.ended()}
        left_out = [item for item in items if item.nodeid in known]
        items[:] = [item for item in items if item.nodeid not in known]
        config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logstart(self, nodeid, location):
        self._outcome = {"outcome": "passed"}
        self._log.begin(nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            text = str(report.longrepr)
            crash = getattr(report.longrepr, "reprcrash", None)
            self._outcome = {"error": crash.message[:400] if crash else text[-400:]}
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._outcome = {"outcome": "skipped", "why": why[:200]}

    def pytest_runtest_logfinish(self, nodeid, location):
        lost = of_step.context_is_lost()
        if lost:
            self._outcome.setdefault("error", "it left a CUDA context that is lost")
        self._log.end(nodeid, **self._outcome)
        if lost:
            pytest.exit("the CUDA context is lost", returncode=FRESH)


def values(log: Log, folder: Path) -> None:
    """Step: the small cases of every pass, which cover its kernels."""
    from .passes import PASSES

    for row in PASSES:
        for case in row.smalls:
            log.item(f"{row.name} {case}", lambda r=row, c=case: {"off": judged(r, c, "cuda")[2]})


def summarise_values(items: list[dict], folder: Path) -> tuple[bool, str]:
    bad = of_failed(items)
    good = sum("error" not in item for item in items)
    lines = [f"{good} of {len(items)} cases as fp32 says", *bad]
    return bool(items) and good == len(items), "\n".join(lines)


def tests(log: Log, folder: Path) -> None:
    """Step: the tests of every pass."""
    from .passes import PASSES

    run(log, list(dict.fromkeys(test for row in PASSES for test in row.tests)))


def run(log: Log, tests: list[str]) -> None:
    """Raises SystemExit where pytest ended otherwise than by running the tests."""
    code = pytest.main(["-p", "no:cacheprovider", "-q", *tests], plugins=[Recorder(log)])
    ran = (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
        pytest.ExitCode.NO_TESTS_COLLECTED,  # a former process had run them all
    )
    if code not in ran:
        raise SystemExit(int(code))


def summarise_tests(items: list[dict], folder: Path) -> tuple[bool, str]:
    bad = [item for item in items if "error" in item]
    skipped = [item for item in items if item.get("outcome") == "skipped"]
    passed = len(items) - len(bad) - len(skipped)
    lines = [f"{passed} passed, {len(bad)} failed, {len(skipped)} skipped"]
    for item in bad[:5]:
        lines.append(f"{item['item']}: {' '.join(item['error'].split())[:110]}")
    return passed > 0 and not bad, "\n".join(lines)
