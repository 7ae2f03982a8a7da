"""Type annotations: what type checkers are told is what the functions take."""

from pathlib import Path

import pytest

from perf import stubs

ROOT = Path(__file__).resolve().parents[1]


def test_stubs_are_packaged():
    assert '"*.pyi"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("module", stubs.MODULES, ids=lambda x: x.__name__)
def test_stubs_are_current(module):
    path = stubs.path_of(module)
    assert path.read_text() == stubs.stub(module), "run python -m perf.stubs"
