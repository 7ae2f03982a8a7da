"""The persistent schedule: every tile exactly once, long ones first, work spread evenly."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fa3.kernels.scheduler import Deal, TileOrder


def order_of(m, heads, heads_kv, batches, group, longest_first=True) -> TileOrder:
    return TileOrder(longest_first, m, heads, heads_kv, batches, group)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.booleans(),
    st.integers(1, 20),
)
def test_every_tile_exactly_once(m, ratio, heads_kv, batches, group, longest_first, num_ctas):
    heads = ratio * heads_kv
    order = order_of(m, heads, heads_kv, batches, min(group, heads * batches), longest_first)
    assert order.count == m * heads * batches
    found = []
    for cta in range(num_ctas):
        deal = Deal(cta, num_ctas, order.count)
        positions = [deal[wave] for wave in range(deal.count)]
        assert positions == sorted(positions)
        tiles = [order[p] for p in positions]
        assert all(t.head_kv == t.head // ratio for t in tiles)
        found += [(t.m_block, t.head, t.batch) for t in tiles]
    assert sorted(found) == sorted(
        (i, h, b) for i in range(m) for h in range(heads) for b in range(batches)
    )


def test_longest_tiles_of_a_group_come_first():
    order = order_of(m=8, heads=4, heads_kv=2, batches=2, group=4)
    m_blocks = [order[p].m_block for p in range(order.count)]
    assert m_blocks[:32] == sorted(m_blocks[:32], reverse=True)
    assert {order[p].batch for p in range(32)} == {0}  # the first group stays in L2 together


def test_without_a_mask_heads_follow_each_other():
    order = order_of(m=3, heads=2, heads_kv=1, batches=1, group=1, longest_first=False)
    assert [(order[p].head, order[p].m_block) for p in range(6)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip


def test_a_causal_call_is_balanced():
    """Blocks per CTA for 16 heads of 4096 queries, tiles of 128 x 128, on 132 CTAs."""
    order = order_of(m=32, heads=16, heads_kv=16, batches=1, group=16)
    work = []
    for cta in range(132):
        deal = Deal(cta, 132, order.count)
        work.append(sum(order[deal[wave]].m_block + 1 for wave in range(deal.count)))
    mean = sum(work) / len(work)
    assert max(work) <= 1.1 * mean, (max(work), mean)
