"""The producer warp of the backward kernel."""

from typing import Any

import cutlass
import cutlass.cute as cute

from .rings import BwdRings


@cute.jit
def load(plan: cutlass.Constexpr, tensors: Any, rings: BwdRings, work: Any):
    """K and V of a tile, then Q and dO of the query blocks that see it, head after head.

    Warpgroups that share the products release V with K and dO with Q: who has waited for the space
    of one has that of the other.
    """
    k, v, q, do = (ring.producer() for ring in (rings.k, rings.v, rings.q, rings.do))
    has_space = None if plan.config.splits_products else True
    tile = work.first()
    while tile.is_valid:
        sequence, blocks = work.sequence_of(tile), work.blocks_of(tile)
        fill_k = rings.k.filler(tensors.k, plan.k_tile, sequence.keys, tile.head_kv, 0)
        fill_v = rings.v.filler(tensors.v, plan.v_tile, sequence.keys, tile.head_kv, 0)
        fill_k(tile.n_block, k.acquire_and_advance())
        fill_v(tile.n_block, v.acquire_and_advance(has_space))
        for i in cutlass.range(work.heads_per_group, unroll=1):
            head = tile.head_kv * work.heads_per_group + i
            lse, delta = work.row_stats(tile, head)  # (tile_m, m_blocks)
            fill_q = rings.q.filler(tensors.q, plan.q_tile, sequence.queries, head, lse)
            fill_do = rings.do.filler(tensors.do, plan.do_tile, sequence.queries, head, delta)
            for j in cutlass.range(blocks.count, unroll=1):
                m_block = blocks.m_max - 1 - j
                fill_q(m_block, q.acquire_and_advance())
                fill_do(m_block, do.acquire_and_advance(has_space))
        tile = work.next(tile)
