"""The step runner of perf.device, with steps that need no GPU: nothing that goes wrong spreads."""

import importlib
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from perf import sweep
from perf.device import __main__ as command
from perf.device.log import Log, context_is_lost
from perf.device.runner import MOST_PROCESSES, Outcome, Step, pack, run, run_step, screen
from perf.device.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
LONG = 60.0  # never reached where a test passes


def count(items, folder):
    bad = [item["item"] for item in items if "error" in item]
    return not bad, f"{len(items)} items, bad: {bad}"


def step(name, limit=LONG, patience=LONG, summarise=count):
    return Step(
        name, f"what {name} does", f"tests.perf.device_steps:{name}", limit, patience, summarise
    )


def items(folder, name):
    return {line["item"]: line for line in Log(folder / f"{name}.jsonl").ended()}


def test_results_stay_and_are_not_made_again(tmp_path):
    first = run([step("plain")], tmp_path)
    assert (first["plain"].status, first["plain"].text) == ("ok", "3 items, bad: []")
    assert items(tmp_path, "plain")["b"]["value"] == "b"
    again = run([step("plain")], tmp_path)
    assert again == first
    assert (tmp_path / "ran").read_text().split() == ["a", "b", "c"]


def test_again_does_them_again(tmp_path):
    run([step("plain")], tmp_path)
    run([step("plain")], tmp_path, again=True)
    assert (tmp_path / "ran").read_text().split() == ["a", "b", "c"] * 2


def test_a_step_goes_on_where_it_stopped(tmp_path):
    log = Log(tmp_path / "plain.jsonl")
    log.item("a", dict)
    with log.path.open("a") as file:
        file.write('{"item": "b", "va')  # killed while it wrote
    outcome = run([step("plain")], tmp_path)["plain"]
    assert outcome.text == "3 items, bad: []"
    assert (tmp_path / "ran").read_text().split() == ["b", "c"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raising", "ZeroDivisionError: division by zero"),
        ("hanging", "its process ended: nothing for 1 s"),
        ("dying", "its process ended: exit code 9"),
    ],
)
def test_a_bad_item_costs_only_itself(name, why, tmp_path):
    outcomes = run([step(name, patience=1), step("plain")], tmp_path)
    assert (outcomes[name].status, outcomes[name].text) == ("bad", "3 items, bad: ['b']")
    assert items(tmp_path, name)["b"]["error"] == why
    assert outcomes["plain"].status == "ok"


def test_a_lost_cuda_context_gets_a_new_process(tmp_path):
    outcome = run([step("losing_the_context")], tmp_path)["losing_the_context"]
    assert outcome.text == "2 items, bad: ['a']"
    assert items(tmp_path, "losing_the_context")["a"]["error"].endswith("context that is lost")
    assert (tmp_path / "ran").read_text().split() == ["process", "process"]


def test_a_step_whose_every_item_breaks_its_process_is_given_up(tmp_path):
    outcome = run([step("losing_it_always")], tmp_path)["losing_it_always"]
    assert outcome.status == "failed"
    assert outcome.text.startswith(f"{MOST_PROCESSES} processes broke; so far: ")
    assert len((tmp_path / "ran").read_text().split()) == MOST_PROCESSES


def test_a_broken_step_does_not_stop_the_next(tmp_path):
    outcomes = run([step("broken"), step("plain")], tmp_path)
    assert outcomes["broken"].status == "failed"
    assert "ImportError: no such thing" in (tmp_path / "broken.log").read_text()
    assert outcomes["plain"].status == "ok"


def test_a_summary_that_raises_is_the_failure_of_its_step(tmp_path):
    outcomes = run([step("plain", summarise=lambda items, folder: items["none"])], tmp_path)
    assert outcomes["plain"].status == "failed"
    assert "TypeError" in outcomes["plain"].text


def test_a_step_that_cannot_be_done_here_gives_its_reason(tmp_path):
    assert run([step("absent")], tmp_path)["absent"].status == "skipped"
    assert run([step("absent")], tmp_path)["absent"].text == "the tool is not installed"


def test_the_limit_of_a_step_ends_it_and_its_children(tmp_path):
    slow = step("slow_with_children")
    outcome = run_step(slow, tmp_path, limit=4)
    assert outcome.status == "timed out"
    assert "so far: 1 items" in outcome.text
    (child,) = map(int, (tmp_path / "ran").read_text().split())
    deadline = time.monotonic() + LONG
    while _is_alive(child) and time.monotonic() < deadline:  # a signal takes its time
        time.sleep(0.05)
    assert not _is_alive(child)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_step_that_timed_out_is_taken_up_again(tmp_path):
    slow = step("hanging", limit=4)
    assert run([slow], tmp_path)["hanging"].status == "timed out"
    assert set(items(tmp_path, "hanging")) == {"a"}
    patient = step("hanging", patience=1)
    assert run([patient], tmp_path)["hanging"].text == "3 items, bad: ['b']"


def test_no_step_begins_without_budget(tmp_path):
    outcomes = run([step("plain")], tmp_path, budget=0)
    assert outcomes["plain"].status == "not run"
    assert run([step("plain")], tmp_path)["plain"].status == "ok"


def test_a_folder_holds_one_commit(tmp_path):
    run([step("plain")], tmp_path, commit="one")
    with pytest.raises(ValueError, match="holds results of commit one, this is two"):
        run([step("plain")], tmp_path, commit="two")


def test_archive_holds_results_and_no_compiled_kernels(tmp_path):
    folder = tmp_path / "out"
    (folder / "cache").mkdir(parents=True)
    (folder / "cache" / "kernel.zip").write_bytes(b"large")
    run([step("plain")], folder, archive=folder / "all.tar.gz")
    pack(folder, folder / "all.tar.gz")  # an archive never holds its predecessor
    with tarfile.open(folder / "all.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["plain.jsonl", "plain.log", "ran", "steps.json"]


def test_screen():
    outcomes = {"a": Outcome("ok", "fine", 1.5), "longer": Outcome("bad", "one\ntwo", 10)}
    assert screen(outcomes).splitlines() == [
        "a       ok           1.5 s  fine",
        "longer  bad         10.0 s  one",
        "        two",
    ]


SAMPLE = """
import time, pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_hangs(): time.sleep(600)
def test_context():
    from perf.device import log
    log.context_is_lost = lambda: True
    raise RuntimeError("misaligned address")
def test_after(): pass
"""


def test_the_suite_survives_hanging_and_poisoned_tests(tmp_path):
    from perf.device.accuracy import summarise_tests as summarise

    (tmp_path / "test_sample.py").write_text(SAMPLE)
    outcome = run([step("suite", patience=3, summarise=summarise)], tmp_path)["suite"]
    found = {name.partition("::")[2]: line for name, line in items(tmp_path, "suite").items()}
    assert outcome.status == "bad"
    assert outcome.text.splitlines()[0] == "2 passed, 3 failed, 1 skipped"
    assert found["test_good"]["outcome"] == found["test_after"]["outcome"] == "passed"
    assert "assert 1 == 2" in found["test_bad"]["error"]
    assert found["test_hangs"]["error"] == "its process ended: nothing for 3 s"
    assert "misaligned address" in found["test_context"]["error"]
    assert found["test_skipped"]["why"] == "Skipped: not here"


def test_a_suite_that_cannot_be_collected_fails(tmp_path):
    (tmp_path / "test_sample.py").write_text("import no_such_module")
    assert run([step("suite")], tmp_path)["suite"].status == "failed"


class Cuda:
    """torch.cuda of a process in which a kernel did what it must not."""

    def __init__(self, initialized, lost):
        self.is_initialized = lambda: initialized
        self._lost = lost

    def synchronize(self):
        if self._lost:
            raise RuntimeError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize(
    ("cuda", "lost"),
    [(Cuda(True, True), True), (Cuda(True, False), False), (Cuda(False, True), False)],
)
def test_a_lost_context_is_noticed(cuda, lost, monkeypatch):
    monkeypatch.setattr(torch, "cuda", cuda)
    assert context_is_lost() == lost


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the steps would run")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "perf.device", "--out", str(out)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no GPU of compute capability 9.0" in done.stdout
    assert not out.exists()


def test_command_runs_what_is_asked_for_in_the_order_of_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "hopper", lambda: True)
    table = (step("plain"), step("broken"), step("absent"))
    arguments = ["--out", str(tmp_path / "out"), "--commit", "abc"]
    assert command.main([*arguments, "--steps", "absent,plain"], table) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:2] for line in last] == [["plain", "ok"], ["absent", "skipped"]]
    assert command.main(arguments, table) == 1
    content = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert content["commit"] == "abc"
    assert {name: one["status"] for name, one in content["steps"].items()} == {
        "plain": "ok",
        "broken": "failed",
        "absent": "skipped",
    }
    assert command.main(["--out", str(tmp_path / "out"), "--commit", "other"], table) == 2


def test_command_list_and_mistakes(capsys):
    assert command.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [step.name for step in STEPS]
    for mistake in (["--out", "x", "--steps", "nothing"], []):
        with pytest.raises(SystemExit):
            command.main(mistake)
    assert "there is no 'nothing'" in capsys.readouterr().err


def test_every_row_of_the_table_names_a_function_and_a_summary(tmp_path):
    for one in STEPS:
        module, _, function = one.work.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), one.name
        assert not one.summarise([], tmp_path)[0], f"{one.name}: nothing found is not fine"
        assert one.patience <= one.limit, one.name


@pytest.mark.parametrize(("bytes_", "code", "verdict"), [(3, 0, "fits"), (2**21, 1, "too much")])
def test_what_travels_is_weighed(bytes_, code, verdict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "MOST_BYTES", 2**20)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text(".device\nout\n")
    (tmp_path / ".device").mkdir()
    (tmp_path / ".device" / "x").write_bytes(bytes(bytes_))
    (tmp_path / "out").write_bytes(bytes(2**21))
    assert command.travels(tmp_path) == code
    assert verdict in capsys.readouterr().out
