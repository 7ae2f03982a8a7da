"""The measurement of the emulator's own speed: what it counts and prints, not how fast it is."""

import pytest

from perf import emulator as measurement


def test_cells_of_a_speed():
    speed = measurement.Speed(instructions=600_000, cpu=1.5, wall=1.75, wall_of_two=1.0)
    assert speed.cells == ("600000", "1.50", "0.400", "1.75", "1.00")
    assert len(speed.cells) + 2 == len(measurement.COLUMNS)


def test_levels_leave_out_the_vector_clocks_alone():
    levels = measurement.levels()
    assert levels["none"] == ()
    assert set(levels["all"]) - set(levels["all but race, global"]) == {"race", "global"}


def test_the_best_of_several_calls_counts(monkeypatch):
    calls = iter([(9, 9.0, 9.0), (8, 3.0, 5.0), (8, 2.0, 6.0), (8, 9.0, 4.0), (8, 9.0, 3.0)])
    monkeypatch.setattr(measurement, "_once", lambda *_: next(calls))
    found = measurement.measured(lambda: None, (), 2)
    assert found == measurement.Speed(8, 2.0, 5.0, 3.0)
    with pytest.raises(StopIteration):
        next(calls)
