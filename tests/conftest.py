"""Where the kernels run: on a Hopper GPU if there is one, else in the emulator with all checks."""

import math
import os

import pytest
import torch

SEED = 20240711
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
if not HOPPER:
    os.environ["FA3_CPU"] = "emulate"  # fa3 reads it when it meets the first CPU tensor
    # Several tests run at once, if any, and the cores are busy: more threads wait for each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# Quick and basic first, so that a broken build shows early; other files come after these.
ORDER = (
    "test_import",
    "test_packaging",
    "test_problem",
    "test_dispatch",
    "test_cases",
    "test_accuracy_rule",
    "test_reference",
    "test_jit",
    "test_torch_op",
    "test_forward",
)


def pytest_report_header():
    where = torch.cuda.get_device_name() if HOPPER else "the emulator, all checks on"
    return f"fa3: kernels run on {where}; torch {torch.__version__}; seed {SEED}"


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(ORDER)}
    last = len(ORDER) - 1  # before the accuracy tests, which take the longest
    items.sort(key=lambda item: place.get(item.path.stem, last - 0.5))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the tensors that a kernel is to be called with."""
    if HOPPER:
        return torch.device("cuda", torch.cuda.current_device())
    from fa3 import emulator

    emulator.install()
    emulator.configure(checks=emulator.ALL_CHECKS, processes=1)
    return torch.device("cpu")


@pytest.fixture
def run_on(monkeypatch):
    """Chooses the target of all calls; what is known of calls to another one is forgotten."""
    from fa3 import autograd, ops
    from fa3.launch import dispatch

    def choose(target):
        monkeypatch.setattr(dispatch, "target_of", lambda device: target)
        forget()

    def forget():
        for module in (ops, autograd):
            for plan in (module.plan_of, module._check_layouts):
                plan.cache_clear()

    yield choose
    forget()


@pytest.fixture
def plain_torch(run_on):
    """CPU tensors are computed without a kernel, whatever FA3_CPU says."""
    from fa3.launch import dispatch

    run_on(dispatch.Target("reference", "CPU", (0, 0), 1))


@pytest.fixture
def ampere(device, run_on):
    """Chooses the GPU that tensors live on, by its compute capability."""
    from fa3.launch import dispatch

    from .ampere import target_of

    def choose(capability):
        target = target_of(capability)
        if HOPPER:  # which runs the same kernels, compiled for itself
            target = dispatch.target_of(device)._replace(capability=capability)
        run_on(target)

    return choose


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not HOPPER:
        pytest.skip("no GPU of compute capability 9.0")


@pytest.fixture
def poisoned(monkeypatch):
    """New memory holds NaN, and counters that no tile would pass."""

    def fill(x):
        return x.fill_(math.nan if x.is_floating_point() else -(1 << 30))

    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *x, **more: fill(empty_like(*x, **more)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *x, **more: fill(new_empty(*x, **more)))
