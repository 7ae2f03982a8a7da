"""Epilogue of the backward kernel: dK and dV through the space of K and V, and TMA."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.tensor_utils import LayoutEnum

from ...views import convert
from ..rings import Ring
from .products import BwdFragments, store
from .rings import BwdRings
from .sides import Side


@cute.jit
def store_gradients(
    frag: BwdFragments,
    rings: BwdRings,
    tensors: Any,
    tile: Any,
    keys: Any,
    thread: Any,
    is_storing_warp: Any,
    softmax_scale: Float32,
):
    """registers -> stmatrix -> shared memory -> TMA, which drops rows beyond s_k and columns.

    They wait until the last products of all have read K and V.
    """
    plan = frag.plan
    if cutlass.const_expr(not plan.signature.with_dkv):
        _release(plan, rings.k, is_storing_warp)
        return
    sdK, sdV = rings.k.buffer[None, None, 0], rings.v.buffer[None, None, 0]
    dv_16 = cute.make_rmem_tensor_like(frag.acc_dV, plan.element)
    convert(frag.acc_dV, dv_16)
    frag.acc_dK.store(frag.acc_dK.load() * softmax_scale)
    dk_16 = cute.make_rmem_tensor_like(frag.acc_dK, plan.element)
    convert(frag.acc_dK, dk_16)
    plan.barriers.products_done()
    store(frag.mma.dv, dv_16, frag.acc_dV, sdV, thread)
    store(frag.mma.dk, dk_16, frag.acc_dK, sdK, thread)
    cute.arch.fence_view_async_shared()
    plan.barriers.gradients_written()
    if is_storing_warp:
        _to_memory(tensors.dv, sdV, keys, tile, plan.v_tile)
        _to_memory(tensors.dk, sdK, keys, tile, plan.k_tile)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()  # a lane knows of its own store, and one releases for all
        rings.k.release(0)  # and V: load()


@cute.jit
def store_side(
    side: Side,
    rings: BwdRings,
    tensors: Any,
    tile: Any,
    keys: Any,
    thread: Any,
    is_storing_warp: Any,
    is_first: cutlass.Constexpr[bool],
    factor: Float32 | None,
):
    """The same of a warpgroup that has one of dK and dV, transposed; each stores its own."""
    plan = side.plan
    ring, operand, shape = (
        (rings.v, tensors.dv, plan.v_tile) if is_first else (rings.k, tensors.dk, plan.k_tile)
    )
    if cutlass.const_expr(not plan.signature.with_dkv):
        _release(plan, ring, is_storing_warp)
        return
    space = ring.buffer[None, None, 0]
    if cutlass.const_expr(factor is not None):
        side.acc_sums.store(side.acc_sums.load() * factor)
    values = cute.make_rmem_tensor_like(side.acc_sums, plan.element)
    convert(side.acc_sums, values)
    plan.barriers.products_done()
    by_channels = cute.make_tensor(space.iterator, cute.select(space.layout, mode=[1, 0]))
    store(side.mma.sums, values, side.acc_sums, by_channels, thread, LayoutEnum.COL_MAJOR)
    cute.arch.fence_view_async_shared()
    plan.barriers.gradients_written()
    if is_storing_warp:
        _to_memory(operand, space, keys, tile, shape)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()
        ring.release(0)


@cute.jit
def _release(plan: cutlass.Constexpr[Any], ring: Ring, is_storing_warp: Any):
    """K or V, where nothing is stored."""
    plan.barriers.products_done()
    if is_storing_warp:
        ring.release(0)


def _to_memory(operand: Any, smem: cute.Tensor, keys: Any, tile: Any, shape):
    rows = cute.local_tile(keys.tiled(operand.tensor, tile.head_kv, 0), shape, (None, 0))
    source, target = cpasync.tma_partition(
        operand.atom,
        0,
        cute.make_layout(1),
        cute.group_modes(smem, 0, 2),
        cute.group_modes(rows, 0, 2),  # (rows, columns, n_blocks)
    )
    cute.copy(operand.atom, source, target[None, tile.n_block])
