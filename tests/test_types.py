"""Type annotations: what type checkers are told is what the functions take."""

from pathlib import Path

import pytest

import fa3
from perf import stubs

FOLDER = Path(fa3.__file__).parent


def test_package_is_typed():
    assert (FOLDER / "py.typed").exists()
    data = (FOLDER.parent / "pyproject.toml").read_text()
    assert '"*.pyi", "py.typed"' in data


@pytest.mark.parametrize("module", stubs.MODULES, ids=lambda x: x.__name__)
def test_stubs_are_current(module):
    path = stubs.path_of(module)
    assert path.read_text() == stubs.stub(module), "run python -m perf.stubs"
