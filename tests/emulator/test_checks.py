"""What checks, schedules and edits of the PTX do; test_sanitizer.py has a bug for each check."""

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


def test_poison_makes_unwritten_memory_show(double):
    assert double("wait", "late") > 0
    assert not double("wait", "late", "poison") < float("inf")  # NaN


def test_late_mode_runs_bulk_loads_when_nothing_else_can(emulator, double):
    with emulator.options(checks=(), late=True) as chosen:
        assert chosen.checks == ("late",)
    assert double("wait") == 0 and double("wait", "late") > 0


@pytest.mark.parametrize("checks", [None, True, 5])
def test_checks_that_are_no_names(emulator, checks):
    message = f"checks is {checks}, expected names among proxy, "
    with pytest.raises(TypeError, match=message), emulator.options(checks=checks):
        pass


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
