"""The producer warp of the forward kernel."""

import cutlass
import cutlass.cute as cute

from ...tensors import FwdTensors
from ..rings import FwdRings


@cute.jit
def load(plan: cutlass.Constexpr, tensors: FwdTensors, rings: FwdRings, tiles):
    """Fill the rings, tile after tile: K of block n travels beside V of block n + 1.

    Whichever has the earlier free slot goes first, or it would wait for the other's.

    The first K of a tile goes ahead of its Q, which may have to wait until the O of the tile
    before has left the same space (config.OSpace).
    """
    q, k, v = rings.q.producer(), rings.k.producer(), rings.v_loaded.producer()
    for wave in cutlass.range(tiles.count, unroll=1):
        tile = tiles[wave]
        blocks = tiles.blocks_of(tile)
        fill_q = rings.q.filler(tensors.q, plan.q_tile, tile.head, tile.batch, 0)
        fill_k = rings.k.filler(tensors.k, plan.k_tile, tile.head_kv, tile.batch, 0)
        fill_v = rings.v_loaded.filler(tensors.v, plan.v_tile, tile.head_kv, tile.batch, 1)

        fill_k(blocks.n_max - 1, k.acquire_and_advance())
        fill_q(tile.m_block, q.acquire_and_advance())
        for i in cutlass.range(blocks.count - 1, unroll=1):
            n_block = blocks.n_max - 2 - i
            if cutlass.const_expr(plan.frees_v_first):
                fill_v(n_block + 1, v.acquire_and_advance())
            fill_k(n_block, k.acquire_and_advance())
            if cutlass.const_expr(not plan.frees_v_first):
                fill_v(n_block + 1, v.acquire_and_advance())
        fill_v(blocks.n_min, v.acquire_and_advance())
