"""The rule that every kernel's result has to pass."""

import torch


def assert_accurate(name, actual, exact, baseline, factor=2.0, mean_factor=1.5):
    """A kernel may lose at most twice what torch itself loses at this precision.

    exact: fp32 arithmetic on the same rounded inputs, rounded to the output's dtype.
    baseline: the same with every intermediate in the input's dtype.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}"
    assert actual.dtype == exact.dtype, f"{name}: dtype {actual.dtype}"
    assert_same_nonfinite(name, actual, exact)
    if exact.numel() == 0:
        return
    # what one rounding of a number of this size costs in this dtype
    floor = 2 * (exact + 0.3 - 0.3 - exact).abs().max().item()
    ours, theirs = _errors(actual, exact), _errors(baseline, exact)
    limit = factor * theirs[0] + floor
    mean_limit = mean_factor * theirs[1] + floor / 4
    assert ours[0] <= limit, f"{name}: largest error {ours[0]:.3e}, allowed {limit:.3e}"
    assert ours[1] <= mean_limit, f"{name}: mean error {ours[1]:.3e}, allowed {mean_limit:.3e}"


def assert_lse(name, actual, exact):
    """At most 2^-15, relative where lse is above 1; fp32 on both sides.

    An error of lse is the relative error of every probability computed from it. It cannot be
    relative to an lse near 0: that is a difference of much larger products.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}"
    assert actual.dtype == torch.float32, f"{name}: dtype {actual.dtype}"
    assert_same_nonfinite(name, actual, exact)
    finite = exact.isfinite()
    if finite.any():
        error = (actual - exact)[finite].abs() / exact[finite].abs().clamp(min=1)
        worst = error.max().item()
        assert worst <= 2**-15, f"{name}: largest error {worst:.3e}, allowed {2**-15:.3e}"


def assert_same_nonfinite(name, actual, exact):
    for what, test in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(actual) != test(exact)).sum().item()
        assert wrong == 0, f"{name}: {wrong} places differ in being {what}"


def _errors(actual, exact):
    error = (actual.float() - exact.float())[exact.isfinite()].abs()
    return (error.max().item(), error.mean().item()) if error.numel() else (0.0, 0.0)
