"""docs/examples/tutorial_kernel.py: its bugs, and what docs/own_kernel.md says that they print."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def tutorial(emulator):
    return runpy.run_path(str(DOCS / "examples" / "tutorial_kernel.py"))["main"]


def printed(bug: str) -> str:
    """What the page shows for a bug, its lines joined."""
    command = rf"\$ python docs/examples/tutorial_kernel.py{bug and ' '}{bug}\n"
    (text,) = re.findall(rf"{command}(.*?)```", (DOCS / "own_kernel.md").read_text(), re.S)
    return " ".join(text.split())


def test_without_a_bug(tutorial, capsys, emulator):
    tutorial("")
    assert " ".join(capsys.readouterr().out.split()) == printed("")
    scale = emulator.watched["scale"].of()
    assert scale.shape == (128, 1) and np.all(scale == 0.125)


@pytest.mark.parametrize(
    "bug, error", [("bytes", "Deadlock"), ("wait", "Race"), ("registers", "RegisterInFlight")]
)
def test_bugs_that_checks_find(tutorial, emulator, bug, error):
    with pytest.raises(getattr(emulator, error)) as found:
        tutorial(bug)
    text = re.sub(r"\S*/(tutorial_kernel.py)", r"\1", str(found.value))
    text = re.sub(r" \(PTX line \d+: [^)]*\)", "", text)
    text = " ".join(re.sub(r"\n  (in CTA|  in the loop).*", "", text).split())
    assert f"{error}: {text}" == printed(bug)


def test_a_bug_that_only_values_show(tutorial, capsys):
    with pytest.raises(AssertionError, match="not close"):
        tutorial("scale")
    assert " ".join(capsys.readouterr().out.split()) == printed("scale")


def test_the_traceback_ends_where_the_kernel_was_called(tutorial, emulator):
    """What is wrong stands in the message; a hundred lines of the emulator would hide it."""
    with pytest.raises(emulator.Deadlock) as found:
        tutorial("bytes")
    files = [Path(str(entry.path)).name for entry in found.traceback]
    assert "tutorial_kernel.py" in files
    assert not {"launch.py", "cluster.py", "report.py"} & set(files)
    assert len(files) <= 10
