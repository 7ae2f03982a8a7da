"""The simulation of perf.moves, on scores whose moves can be counted by hand."""

import numpy as np

from perf.moves import ROWS, main, share_of_moves


def test_counts_by_hand():
    """Four blocks of two keys; of the three after the first, one row makes two of them move."""
    s = np.zeros((2 * ROWS, 8))
    s[3, 2] = 9.0  # beyond the headroom of 8
    s[3, 4] = 16.0  # within 8 of the new maximum
    s[3, 6] = 17.5  # beyond it: the maximum is still 9
    assert share_of_moves(s, tile_n=2, headroom=8.0) == 2 / 6  # the other warp never moves
    assert share_of_moves(s, tile_n=2, headroom=100.0) == 0.0


def test_prints_a_line_per_kind_of_data(capsys):
    assert main(["--keys", "704", "--warps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["normal", "outliers", "sink", "rising"]
    assert all("bf16" in line and "fp16" in line for line in lines[1:])
