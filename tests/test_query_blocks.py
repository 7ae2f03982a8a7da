"""QueryRange against brute force: which query blocks a key tile must visit, which need a mask."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3.kernels.blocks import Window
from fa3.kernels.query_blocks import QueryRange, first_tile

from .test_blocks import visible, windows


def visited(blocks: QueryRange) -> list[tuple[int, bool]]:
    """(block, is_masked) in the order of the kernel."""
    steps = []
    for phase in blocks.phases():
        steps += [(m, phase.is_masked) for m in reversed(range(phase.m_begin, phase.m_end))]
    return steps


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    windows((None,)),
    st.sampled_from([(64, 128), (128, 128), (80, 128), (16, 8), (8, 16)]),
    st.data(),
)
def test_every_needed_block_once(window, tile, data):
    tile_m, tile_n = tile
    n_block = data.draw(st.integers(0, (window.s_k - 1) // tile_n))
    keys = range(n_block * tile_n, min((n_block + 1) * tile_n, window.s_k))
    blocks = QueryRange.of(window, n_block, tile_m, tile_n)
    steps = visited(blocks)
    order = [m for m, _ in steps]
    assert order == list(reversed(range(blocks.m_min, blocks.m_max)))
    assert blocks.count == len(order)

    seeing = {}
    for m in range(-(-window.s_q // tile_m)):
        rows = range(m * tile_m, min((m + 1) * tile_m, window.s_q))
        seeing[m] = [visible(window, i, j) for i in rows for j in keys]
    needed = {m for m, seen in seeing.items() if any(seen)}
    assert needed <= set(order) <= set(seeing)
    assert len(order) <= len(needed) + 1  # where none is needed, one may be visited
    for m, is_masked in steps:
        assert is_masked or (all(seeing[m]) and len(keys) == tile_n), f"block {m} needs a mask"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(windows((None,)), st.sampled_from([(64, 128), (64, 64), (16, 8)]), st.data())
def test_the_tiles_that_visit_a_block_follow_each_other(window, tile, data):
    """Ascending from first_tile, which is how they add to dQ in a fixed order."""
    tile_m, tile_n = tile
    m_block = data.draw(st.integers(0, (window.s_q - 1) // tile_m))
    tiles = range(-(-window.s_k // tile_n))
    ranges = {n: QueryRange.of(window, n, tile_m, tile_n) for n in tiles}
    visiting = [n for n, blocks in ranges.items() if blocks.m_min <= m_block < blocks.m_max]
    first = first_tile(window, m_block, tile_m, tile_n)
    assert visiting == list(range(first, first + len(visiting)))


def test_interior_blocks_have_no_mask():
    window = Window("causal", s_q=4096, s_k=4096, left=0, right=0)
    steps = visited(QueryRange.of(window, 20, 64, 128))
    assert [m for m, is_masked in steps if is_masked] == [41, 40]
    assert len(steps) == 24


def test_a_tile_with_the_end_of_the_keys_is_masked_throughout():
    window = Window("full", s_q=256, s_k=130, left=0, right=0)
    assert visited(QueryRange.of(window, 0, 64, 128)) == [(m, False) for m in (3, 2, 1, 0)]
    assert visited(QueryRange.of(window, 1, 64, 128)) == [(m, True) for m in (3, 2, 1, 0)]


@pytest.mark.parametrize("kind, phases", [("full", 2), ("causal", 2), ("local", 3)])
def test_phases_are_known_at_compile_time(kind, phases):
    window = Window(kind, s_q=8, s_k=8, left=2, right=2)
    assert len(QueryRange.of(window, 0, 64, 128).phases()) == phases
