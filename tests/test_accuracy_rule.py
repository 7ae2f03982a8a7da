"""The accuracy rule itself: what it lets pass, what it catches."""

import math

import pytest
import torch

from .accuracy import assert_accurate, assert_lse


@pytest.fixture
def results():
    """A result in fp16 and the rounding errors of a baseline."""
    exact = torch.randn(2, 30, 4, 64).half()
    return exact, exact + 1e-3 * torch.randn(exact.shape).half()


def test_as_good_as_the_baseline(results):
    exact, baseline = results
    assert_accurate("out", exact, exact, baseline)
    assert_accurate("out", 2 * exact - baseline, exact, baseline)


def test_one_wrong_element(results):
    exact, baseline = results
    actual = exact.clone()
    actual[1, 7, 2, 5] += 0.05
    with pytest.raises(AssertionError, match="out: largest error 5"):
        assert_accurate("out", actual, exact, baseline)


def test_small_error_everywhere(results):
    exact, baseline = results
    with pytest.raises(AssertionError, match="out: mean error"):
        assert_accurate("out", exact + 3e-3, exact, baseline)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value, results):
    exact, baseline = results
    actual = exact.clone()
    actual[0, 0, 0, 0] = value
    with pytest.raises(AssertionError, match="out: 1 places differ in being"):
        assert_accurate("out", actual, exact, baseline)


def test_shape_and_dtype(results):
    exact, baseline = results
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate("out", exact[:1], exact, baseline)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate("out", exact.float(), exact, baseline)


def test_lse():
    exact = torch.tensor([0.0, 1e-3, -20.0, -math.inf])
    assert_lse("lse", exact + torch.tensor([2e-5, -2e-5, 2e-4, 0.0]), exact)
    with pytest.raises(AssertionError, match="lse: largest error"):
        assert_lse("lse", exact + torch.tensor([4e-5, 0.0, 0.0, 0.0]), exact)
    with pytest.raises(AssertionError, match="differ in being -inf"):
        assert_lse("lse", exact.clamp(min=-100), exact)
