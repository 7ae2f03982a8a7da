"""Each check catches its bug, names the kernel's line, and passes the kernel without the bug."""

import importlib
import inspect
import re

import pytest
import torch


def line_of(function: str, text: str, file: str = "kernels") -> str:
    """ "kernels.py:line" of a piece of source of a kernel."""
    kernel = getattr(importlib.import_module(f"..{file}", __name__), function)
    lines, first = inspect.getsourcelines(inspect.unwrap(getattr(kernel, "func", kernel)))
    at = [i for i, line in enumerate(lines) if text in line]
    assert len(at) == 1, f"{text!r} is on {len(at)} lines of {function}"
    return f"{file}.py:{first + at[0]}"


@pytest.fixture
def double(emulator, compiled):
    """double(broken, checks) runs the kernel and returns the largest error."""

    def run(broken, *checks):
        source, target = torch.randn(64, 64).half(), torch.zeros(64, 64).half()
        with emulator.options(checks=checks):
            compiled("double", source, target, broken=broken)(source, target)
        return (target - 2 * source).abs().max().item()

    return run


BUGS = [
    # broken, check, error, message, line of _double
    (
        "fence",
        "proxy",
        "MissingProxyFence",
        r"TMA store reads .* by thread \d+, without fence",
        "cute.copy(store",
    ),
    ("wait", "uninit late", "Uninitialized", "ld reads uninitialised", "* cutlass.Float16(2)"),
    ("phase", "uninit late", "Uninitialized", "ld reads uninitialised", "* cutlass.Float16(2)"),
    (
        "barrier",
        "mbarrier",
        "BarrierMisuse",
        "ordinary store over the mbarrier at 0x0",
        "barriers[t % 2] = 7",
    ),
    (
        "expect_tx",
        "",
        "Deadlock",
        "mbarrier 0x0 parity 0 .* 8192 bytes outstanding",
        "mbarrier_wait(full, 1",
    ),
]


@pytest.mark.parametrize("broken, checks, error, message, source", BUGS, ids=[b[0] for b in BUGS])
def test_bugs_are_caught(emulator, double, broken, checks, error, message, source):
    with pytest.raises(getattr(emulator, error), match=message) as caught:
        double(broken, *checks.split())
    assert line_of("_double", source) in str(caught.value)
    assert re.search(r"warps \[0", str(caught.value))


@pytest.mark.parametrize("broken", ["fence", "wait"])
def test_bugs_that_no_check_is_on_for_stay_hidden(double, broken):
    """As on a GPU: eagerly executed, these bugs do not show."""
    assert double(broken) == 0


def test_the_correct_kernel_passes_every_check(emulator, double):
    assert double("", *emulator.ALL_CHECKS) == 0


def test_poison_makes_unwritten_memory_show(double):
    assert double("wait", "late") > 0
    assert not double("wait", "late", "poison") < float("inf")  # NaN


def test_late_mode_runs_bulk_loads_when_nothing_else_can(emulator, double):
    with emulator.options(checks=(), late=True) as chosen:
        assert chosen.checks == ("late",)
    assert double("wait") == 0 and double("wait", "late") > 0


def test_eagerly_a_wrong_phase_waits_for_ever(emulator, double):
    with pytest.raises(emulator.Deadlock, match=r"parity 1 \(phase 1, 1 of 1 arrivals"):
        double("phase")


@pytest.fixture
def gemm(emulator, compiled):
    def run(broken, *checks):
        a, b = torch.randint(-4, 5, (2, 64, 64)).half()
        c = torch.zeros(64, 64)
        with emulator.options(checks=checks):
            compiled("gemm", a, b, c, broken=broken)(a, b, c)
        return torch.equal(c, a.float() @ b.float().t())

    return run


def test_accumulators_in_flight(emulator, gemm):
    assert gemm("", "wgmma", "late")
    assert gemm("wait_group"), "eagerly, the missing wait is harmless"
    assert not gemm("wait_group", "late")
    with pytest.raises(emulator.RegisterInFlight, match="accumulator register .* in flight") as e:
        gemm("wait_group", "wgmma")
    assert line_of("_gemm", "gC[i] = acc[i]") in str(e.value)
    assert e.value.source.endswith(line_of("_gemm", "gC[i] = acc[i]"))


def test_operands_in_flight_may_be_read_but_not_overwritten():
    from fa3.emulator.checks import Checks
    from fa3.emulator.registers import WgmmaRegisters

    flight = WgmmaRegisters(Checks(("wgmma",)))
    flight.issue(frozenset({1}), frozenset({2}), ())
    flight.commit()
    assert flight.conflict(frozenset({2}), frozenset()) == ("", set())
    assert flight.conflict(frozenset({2}), frozenset({2})) == ("A operand", {2})
    flight.wait(0)
    assert not flight.busy and flight.conflict(frozenset({1, 2}), frozenset({2})) == ("", set())


def test_deadlock_at_a_named_barrier_lists_who_waits_where(emulator, compiled):
    a = torch.arange(128, dtype=torch.int32)
    with emulator.options(checks=()), pytest.raises(emulator.Deadlock) as caught:
        compiled("reverse", a, sync=256)(a)
    assert "warps [0, 1, 2, 3] (128 lanes): barrier 1: 128 of 256 threads arrived" in str(
        caught.value
    )
    assert line_of("_reverse", "cute.arch.barrier(") in str(caught.value)


def test_uninitialised_shared_memory(emulator, compiled):
    a = torch.arange(128, dtype=torch.int32)
    with emulator.options(checks=("uninit",)):
        with pytest.raises(emulator.Uninitialized, match="at 0x1fc") as caught:
            compiled("reverse", a, sync=-1)(a)
    assert line_of("_reverse", "a[t] = s[") in str(caught.value)


def test_out_of_bounds_names_the_line_of_the_kernel(emulator, compiled):
    a, b, c = torch.zeros(3, 128)
    function = compiled("add", a, b, c.clone(), excess=4096)
    with emulator.options(checks=()), pytest.raises(emulator.OutOfBounds, match="write") as e:
        function(a, b, c.clone())
    assert line_of("_add", "c[i + excess] =") in str(e.value)


def test_edits_of_the_ptx_reach_the_kernel_that_runs(emulator, compiled):
    a, b, c = torch.randn(3, 128)
    function = compiled("add", a, b, c)

    def subtract(ptx):
        assert "add.rn.f32" in ptx or "add.f32" in ptx
        return re.sub(r"add(\.rn)?\.f32", r"sub\1.f32", ptx)

    with emulator.options(checks=(), edit=subtract):
        function(a, b, c)
    assert torch.equal(c, a - b)
    function(a, b, c)
    assert torch.equal(c, a + b)


def test_unsupported_instructions_name_the_line_of_the_kernel(emulator, compiled):
    a, b, c = torch.randn(3, 128)
    function = compiled("add", a, b, c)
    edit = re.compile(r"add(\.rn)?\.f32").sub
    with emulator.options(checks=(), edit=lambda ptx: edit("frobnicate.f32", ptx)):
        with pytest.raises(emulator.Unsupported, match="not emulated: frobnicate.f32") as e:
            function(a, b, c)
    assert line_of("_add", "c[i + excess] =") in str(e.value)
