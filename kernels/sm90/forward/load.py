"""The loading warps of the forward kernel: one that asks TMA, or several that gather rows."""

from typing import Any

import cutlass
import cutlass.cute as cute

from ...tensors import FwdTensors
from ..rings import FwdRings


@cute.jit
def load(plan: cutlass.Constexpr, tensors: FwdTensors, rings: FwdRings, work: Any, warp: Any):
    """Fill the rings, tile after tile: K of block n travels beside V of block n + 1.

    Whichever has the earlier free slot goes first, or it would wait for the other's.

    The first K of a tile goes ahead of its Q, which may have to wait until the O of the tile
    before has left the same space (config.OSpace).
    """
    source = plan.source(warp)
    q, k, v = rings.q.producer(), rings.k_loaded.producer(), rings.v_loaded.producer()
    tile = work.first()
    while tile.is_valid:
        sequence, blocks = work.sequence_of(tile), work.blocks_of(tile)
        head = work.head_of(tile)
        fill_q = rings.q.filler(tensors.q, plan.q_tile, sequence.queries, head, 0)
        fill_k = source.filler(
            rings.k_loaded, tensors.k, plan.k_tile, sequence.keys, tile.head_kv, 0
        )
        fill_v = source.filler(
            rings.v_loaded, tensors.v, plan.v_tile, sequence.keys, tile.head_kv, 1
        )

        fill_k(blocks.n_max - 1, k.acquire_and_advance())
        if warp == 0:
            fill_q(work.query_block_of(tile), q.acquire_and_advance())
        for i in cutlass.range(blocks.count - 1, unroll=1):
            n_block = blocks.n_max - 2 - i
            if cutlass.const_expr(plan.frees_v_first):
                fill_v(n_block + 1, v.acquire_and_advance())
            fill_k(n_block, k.acquire_and_advance())
            if cutlass.const_expr(not plan.frees_v_first):
                fill_v(n_block + 1, v.acquire_and_advance())
        fetched = work.fetch()  # as late as what follows hides it: whoever is ahead asks first
        fill_v(blocks.n_min, v.acquire_and_advance())
        tile = work.next(tile, fetched)
    source.finish()
