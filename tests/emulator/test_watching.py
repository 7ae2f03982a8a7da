"""Values of a kernel's variables: what is kept of what a kernel prints."""

import numpy as np
import pytest

from fa3.emulator.watching import Watched, watch


def test_values_by_thread_and_element():
    watched = Watched()
    for thread in (0, 2):
        for index in (0, 1):
            assert watched.takes((0, 0, 0), thread, f"@watch x {index} {10 * thread + index}.5\n")
    assert watched.takes((1, 0, 0), 0, "@watch x 0 -3")
    expected = [[0.5, 1.5], [np.nan, np.nan], [20.5, 21.5]]
    np.testing.assert_array_equal(watched["x"].of(), expected)
    np.testing.assert_array_equal(watched["x"].of((1, 0, 0)), [[-3.0]])
    assert watched["x"].of((9, 0, 0)).shape == (0, 0)


def test_values_of_a_loop():
    watched = Watched()
    for value in ("1", "nan", "3e-05"):
        watched.takes((0, 0, 0), 0, f"@watch x 0 {value}\n")
    watched.takes((0, 0, 0), 1, "@watch x 0 7\n")
    np.testing.assert_array_equal(watched["x"].of(time=0), [[1], [7]])
    np.testing.assert_array_equal(watched["x"].of(time=1), [[np.nan], [np.nan]])
    np.testing.assert_array_equal(watched["x"].of(), [[3e-05], [7]])


@pytest.mark.parametrize("text", ["x 0 1", "@watch x 0", "@watch x 0 1 2", "so @watch x 0 1"])
def test_other_text_is_printed(text):
    watched = Watched()
    assert not watched.takes((0, 0, 0), 0, text)
    assert watched == {}


def test_a_name_that_nobody_watched():
    with pytest.raises(KeyError, match="'y' was not watched in the last launch"):
        Watched()["y"]


@pytest.mark.parametrize("name", ["", "a b", "100%", "{}"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="expected one without spaces"):
        watch(name, 1.0)
