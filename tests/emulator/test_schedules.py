"""Schedules: what they may change, that seeds reproduce, and how a difference is reported."""

import re

import pytest
import torch

from fa3.emulator import settings

from .test_checks import line_of


@pytest.fixture
def doubled(compiled):
    """doubled(broken) -> a function that runs the kernel and returns its output."""

    def make(broken):
        source = torch.randn(64, 64).half()

        def run():
            target = torch.zeros(64, 64).half()
            compiled("double", source, target, broken=broken)(source, target)
            return [target]

        return run

    return make


@pytest.fixture
def reversal(compiled):
    """reversal(sync) -> a function that runs the kernel and returns its output."""

    def make(sync):
        def run():
            a = torch.arange(128, dtype=torch.int32)
            compiled("reverse", a, sync=sync)(a)
            return [a]

        return run

    return make


def test_correct_kernels_pass(emulator, doubled, reversal):
    (out,) = emulator.compare_schedules(doubled(""), checks=emulator.ALL_CHECKS)
    assert out.any()
    (out,) = emulator.compare_schedules(reversal(0), checks=emulator.ALL_CHECKS)
    assert out.tolist() == list(range(127, -1, -1))


def test_missing_wait_for_a_load(emulator, doubled):
    with pytest.raises(emulator.ScheduleDifference, match="output 0 differs") as found:
        emulator.compare_schedules(doubled("wait"), checks=())
    error = found.value
    assert error.output == 0 and error.index == (0, 0) and error.schedules == ("eager", "late")
    assert "TMA load of CTA (0, 0, 0), warps [0]" in str(error)
    assert line_of("_double", "cute.copy(load") in str(error)
    assert line_of("_double", "cute.copy(store") in str(error)
    assert re.search(r"in flight over shared memory 0x\w+\.\.0x\w+ \(\w+\) at once", str(error))


def test_missing_barrier_between_warps_shows_only_when_they_are_interleaved(emulator, reversal):
    emulator.compare_schedules(reversal(-2), (), checks=())
    with pytest.raises(emulator.ScheduleDifference, match="random, seed") as found:
        emulator.compare_schedules(reversal(-2), range(40), checks=())
    assert "ordinary accesses of other warps" in str(found.value)


def test_missing_wait_for_a_product(emulator, compiled):
    a, b = torch.randint(-4, 5, (2, 64, 64)).half()

    def run(broken):
        c = torch.zeros(64, 64)
        compiled("gemm", a, b, c, broken=broken)(a, b, c)
        return (c,)

    emulator.compare_schedules(lambda: run(""), checks=("wgmma",))
    with pytest.raises(emulator.ScheduleDifference):
        emulator.compare_schedules(lambda: run("wait_group"), checks=())


def test_a_seed_reproduces(emulator, doubled):
    def events(seed):
        trace = []
        with emulator.options(checks=(), schedule="random", seed=seed, trace=trace):
            doubled("")()
        return [(o.what, o.issued, o.completed, o.w.instructions) for o in trace]

    def steps(seed):
        with emulator.options(checks=(), schedule="random", seed=seed):
            doubled("")()
        return emulator.launches[-1]["segments"]

    assert events(3) == events(3)
    assert [steps(s) for s in range(8)] == [steps(s) for s in range(8)]
    assert len({steps(s) for s in range(8)}) > 1


def test_deadlock_is_found_in_random_order(emulator, doubled):
    with emulator.options(checks=(), schedule="random"):
        with pytest.raises(emulator.Deadlock, match="16384 bytes expected, 8192 came"):
            doubled("expect_tx")()


def test_which_schedule_options_choose(emulator):
    with emulator.options(checks=("late",)) as chosen:
        assert chosen.timing().kind == "late"
        with emulator.options(schedule="random", seed=5) as inner:
            assert (inner.timing().kind, inner.timing().seed) == ("random", 5)
    with emulator.options(checks=()) as chosen:
        assert chosen.timing().kind == "eager"
    with pytest.raises(ValueError, match="unknown schedule 'lazy'; known are eager, late, random"):
        emulator.configure(schedule="lazy")


def test_a_check_may_be_given_as_a_string(emulator):
    seen = []
    emulator.compare_schedules(
        lambda: seen.append(settings.current().checks) or [], (), checks="race"
    )
    assert seen == [("race",)] * 2
