"""The persistent schedule: every tile exactly once, long ones first, work spread evenly."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3.kernels.blocks import BlockRange, Window
from fa3.kernels.scheduler import MIN_WAVES, Schedule, TileOrder
from fa3.kernels.signature import Signature
from fa3.launch import tuning

SMS = 132


def order_of(m, heads, heads_kv, batches, num_ctas, longest_first=True, key_bytes=512, s_k=4096):
    group = 1
    if longest_first:
        group = TileOrder.group_of(key_bytes, s_k, m, heads, heads_kv, batches, num_ctas)
    return TileOrder.of(longest_first, m, heads, heads_kv, batches, group)


def dealt(order: TileOrder, num_ctas: int) -> list[list[int]]:
    """Positions by CTA; the grid is as the kernel launches it."""
    grid = min(num_ctas, order.count)
    return [positions_of(Schedule.of(order, cta, grid)) for cta in range(grid)]


def positions_of(schedule: Schedule) -> list[int]:
    """As the roles of a CTA walk through them."""
    positions, tile = [], schedule.first()
    while tile.is_valid:
        positions.append(schedule.deal[tile.turn])
        tile = schedule.next(tile)
    assert len(positions) == count_of(schedule.deal)
    return positions


def count_of(deal) -> int:
    """Tiles of a CTA in closed form: its share of every whole round and of the rest."""
    rounds, rest = divmod(deal.num_tiles, deal.tiles_per_round)
    return rounds * deal._share(deal.tiles_per_round) + deal._share(rest)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 20),
    st.sampled_from([1, 4096, 1 << 20]),
)
def test_every_tile_exactly_once(m, ratio, heads_kv, batches, longest_first, num_ctas, s_k):
    heads = ratio * heads_kv
    order = order_of(m, heads, heads_kv, batches, num_ctas, longest_first, s_k=s_k)
    found = []
    for positions in dealt(order, num_ctas):
        assert positions == sorted(positions)
        tiles = [order[p] for p in positions]
        assert all(t.head_kv == t.head // ratio for t in tiles)
        found += [(t.m_block, t.head, t.batch) for t in tiles]
    assert sorted(found) == sorted(
        (i, h, b) for i in range(m) for h in range(heads) for b in range(batches)
    )


def test_longest_tiles_of_a_round_come_first():
    """Sixteen heads of which four fit in L2."""
    order = order_of(m=64, heads=4, heads_kv=4, batches=4, num_ctas=8, key_bytes=512, s_k=16384)
    assert order.heads_per_group == 4
    first = [order[p] for p in range(order.tiles_per_round)]
    m_blocks = [tile.m_block for tile in first]
    assert m_blocks == sorted(m_blocks, reverse=True)
    assert {tile.batch for tile in first} == {0}


def test_a_round_fills_the_gpu():
    """One query tile per head and a very long cache: L2 holds no head, the round still has work."""
    order = order_of(m=1, heads=8, heads_kv=8, batches=64, num_ctas=SMS, s_k=1 << 20)
    assert order.tiles_per_round == MIN_WAVES * SMS


def test_without_a_mask_heads_follow_each_other():
    order = order_of(m=3, heads=2, heads_kv=1, batches=1, num_ctas=4, longest_first=False)
    assert [(order[p].head, order[p].m_block) for p in range(6)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_causal_work_is_spread_evenly(head_dim, length):
    """The FA3 paper's setting, 16k tokens and hidden size 2048: the CTA with most to do.

    The cost of a tile is its key blocks, and 1.5 more for its first and last products.
    """
    config = tuning.forward(Signature("bf16", head_dim, head_dim, "causal"))
    batches, heads, m = 16384 // length, 2048 // head_dim, -(-length // config.tile_m)
    order = order_of(m, heads, heads, batches, SMS, key_bytes=4 * head_dim, s_k=length)
    window = Window("causal", length, length, 0, 0)
    cost = [BlockRange.of(window, i, config.tile_m, config.tile_n).count + 1.5 for i in range(m)]
    loads = [sum(cost[order[p].m_block] for p in positions) for positions in dealt(order, SMS)]
    assert max(loads) <= 1.09 * sum(loads) / SMS


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 9))
def test_a_cluster_is_dealt_neighbouring_tiles_of_a_head(pairs, heads, batches, clusters):
    """In each turn one per CTA, or none to all; every tile exactly once."""
    order = TileOrder.of(False, 2 * pairs, heads, heads, batches, 1, cluster=2)
    grid = 2 * min(clusters, order.count // 2)
    found = []
    for cta in range(0, grid, 2):
        schedules = [Schedule.of(order, cta + rank, grid) for rank in range(2)]
        tiles = [schedule.first() for schedule in schedules]
        while tiles[0].is_valid:
            first, second = tiles
            assert second == replace(first, m_block=first.m_block + 1)
            found += [(t.batch, t.head, t.m_block) for t in tiles]
            tiles = [s.next(t) for s, t in zip(schedules, tiles, strict=True)]
        assert not tiles[1].is_valid
    assert sorted(found) == list(product(range(batches), range(heads), range(2 * pairs)))
