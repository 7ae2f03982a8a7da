"""The emulator in tests: `pytest_plugins = ["fa3.emulator.pytest_plugin"]` in conftest.py.

A test that has the fixture `emulated` runs its kernels on CPU tensors with all checks. The marker
`emulated` gives it other options, those of `emulator.options`. The ini option `emulated_arch` says
what kernels are compiled for, sm_90a unless told.
"""

import pytest

from . import ALL_CHECKS, install, options


def pytest_addoption(parser) -> None:
    parser.addini("emulated_arch", "what the emulator compiles kernels for", default="sm_90a")


def pytest_configure(config) -> None:
    line = "emulated(**options): options of fa3.emulator for the kernels of this test"
    config.addinivalue_line("markers", line)


@pytest.fixture(scope="session")
def _installed(pytestconfig):
    """SetupError, where the emulator cannot be installed, is the result of every test with it."""
    install(pytestconfig.getini("emulated_arch"))


@pytest.fixture
def emulated(request, _installed):
    """The module fa3.emulator; launches run on the emulator and are checked until the test ends."""
    from fa3 import emulator

    given = {"checks": ALL_CHECKS}
    for mark in reversed(list(request.node.iter_markers("emulated"))):  # the closest comes last
        given.update(mark.kwargs)
    with options(**given):
        yield emulator
