"""BlockRange against brute force: which key blocks a tile must visit, which need a mask."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3.kernels.blocks import BlockRange, Window
from fa3.kernels.signature import UNBOUNDED


def visible(window: Window, row: int, key: int) -> bool:
    """The definition, as documented for flash_attn_func."""
    if window.kind == "full":
        return True
    heads = window.rows_per_query or 1
    aligned = row // heads + window.s_k - window.s_q // heads
    if window.kind == "causal":
        return key <= aligned
    return aligned - window.left <= key <= aligned + window.right


def visited(blocks: BlockRange) -> list[tuple[int, bool]]:
    """(block, is_masked) in the order of the kernel: the first one is always masked."""
    steps = [(blocks.n_max - 1, True)]
    for phase in blocks.phases():
        steps += [(n, phase.is_masked) for n in reversed(range(phase.n_begin, phase.n_end))]
    return steps


@st.composite
def windows(draw, rows_per_query=(None, None, 2, 3, 8)):
    side = st.integers(0, 300) | st.just(UNBOUNDED)
    heads = draw(st.sampled_from(rows_per_query))
    return Window(
        kind=draw(st.sampled_from(["full", "causal", "local"])),
        s_q=draw(st.integers(1, 400 // (heads or 1))) * (heads or 1),
        s_k=draw(st.integers(1, 400)),
        left=draw(side),
        right=draw(side),
        rows_per_query=heads,
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(windows(), st.sampled_from([(128, 80), (128, 176), (192, 128), (16, 8), (8, 16)]), st.data())
def test_every_needed_block_once_and_no_other(window, tile, data):
    tile_m, tile_n = tile
    num_m_blocks = -(-window.s_q // tile_m)
    m_block = data.draw(st.integers(0, num_m_blocks - 1))
    rows = range(m_block * tile_m, min((m_block + 1) * tile_m, window.s_q))
    blocks = BlockRange.of(window, m_block, tile_m, tile_n)
    steps = visited(blocks)
    order = [n for n, _ in steps]
    assert order == list(range(blocks.n_max - 1, blocks.n_min - 1, -1))
    assert blocks.count == len(order) >= 1

    seen_by = {}
    for n in range(-(-window.s_k // tile_n)):
        keys = range(n * tile_n, min((n + 1) * tile_n, window.s_k))
        seen_by[n] = [visible(window, i, j) for i in rows for j in keys]
    needed = {n for n, seen in seen_by.items() if any(seen)}
    assert needed <= set(order) or not needed
    if needed:
        assert set(order) == needed
    for n, is_masked in steps:
        is_whole = n < window.s_k // tile_n
        assert is_masked or (all(seen_by[n]) and is_whole), f"block {n} needs a mask"


def test_a_tile_that_sees_no_key_visits_one_masked_block():
    window = Window("causal", s_q=400, s_k=100, left=0, right=0)
    assert visited(BlockRange.of(window, 0, 128, 128)) == [(0, True)]


def test_interior_blocks_have_no_mask():
    """A long causal row of blocks is masked only at its diagonal."""
    window = Window("causal", s_q=4096, s_k=4096, left=0, right=0)
    steps = visited(BlockRange.of(window, 20, 128, 128))
    assert [n for n, is_masked in steps if is_masked] == [20]
    assert len(steps) == 21


@pytest.mark.parametrize("kind, phases", [("full", 1), ("causal", 2), ("local", 3)])
def test_phases_are_known_at_compile_time(kind, phases):
    window = Window(kind, s_q=8, s_k=8, left=2, right=2)
    assert len(BlockRange.of(window, 0, 128, 128).phases()) == phases


@settings(max_examples=400, deadline=None, derandomize=True)
@given(windows(), st.sampled_from([(128, 80), (64, 16), (16, 8), (8, 16)]), st.data())
def test_splits_are_a_partition_whose_parts_are_masked_where_the_whole_is(window, tile, data):
    tile_m, tile_n = tile
    m_block = data.draw(st.integers(0, -(-window.s_q // tile_m) - 1))
    num_splits = data.draw(st.integers(1, 9) | st.just(300))
    whole = BlockRange.of(window, m_block, tile_m, tile_n)
    masks = dict(visited(whole))
    parts = [visited(whole.split(i, num_splits)) for i in range(num_splits)]
    empty = parts[whole.count :]
    assert empty == [[(0, True)]] * len(empty)
    parts = parts[: whole.count]
    assert [n for part in parts for n, _ in reversed(part)] == sorted(masks)
    assert max(map(len, parts)) == -(-whole.count // num_splits)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        assert all(is_masked or not masks[n] for n, is_masked in part)
        interior = [n for n, is_masked in part[1:] if not is_masked]
        assert interior == [n for n, _ in part[1:] if not masks[n]]
