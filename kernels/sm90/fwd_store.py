"""Epilogue of the forward kernel: O through shared memory and TMA, LSE from registers."""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.utils import LayoutEnum

from ..barriers import WARPGROUP, NamedBarrier
from ..tensors import FwdTensors
from ..views import convert


@cute.jit
def store_lse(mLSE: cute.Tensor, lse: cute.Tensor, row, lane):
    """Two rows per thread; the four threads that share a row hold the same value."""
    for r in cutlass.range_constexpr(2):
        if lane % 4 == 0 and row + 8 * r < mLSE.shape[0]:
            mLSE[row + 8 * r] = lse[r]


@cute.jit
def store_output(
    plan: cutlass.Constexpr,
    tensors: FwdTensors,
    tiled_mma: cute.TiledMma,
    acc_O: cute.Tensor,
    sO: cute.Tensor,  # (64, dv), this warpgroup's rows
    tile,
    warpgroup_index,
    thread,
):
    """A warpgroup's 64 rows of O: registers -> stmatrix -> shared memory -> TMA.

    TMA drops the rows beyond s_q and the columns beyond the true head dim.
    """
    acc_16 = cute.make_rmem_tensor_like(acc_O, plan.element)
    convert(acc_O, acc_16)
    atom = hopper.get_smem_store_op(LayoutEnum.ROW_MAJOR, plan.element, Float32)
    copy = cute.make_tiled_copy_C(atom, tiled_mma).get_slice(thread % WARPGROUP)
    cute.copy(copy, copy.retile(acc_16), copy.partition_D(sO))
    cute.arch.fence_view_async_shared()
    cute.arch.barrier(
        barrier_id=NamedBarrier.O_STORED + warpgroup_index, number_of_threads=WARPGROUP
    )
    if cute.arch.make_warp_uniform(thread // 32) % 4 == 0:
        rows = cute.local_tile(
            tensors.o.tensor[None, None, tile.head, tile.batch], plan.o_tile, (None, 0)
        )  # (64, dv, num_64_row_blocks)
        from_smem, to_rows = cpasync.tma_partition(
            tensors.o.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(sO, 0, 2),
            cute.group_modes(rows, 0, 2),
        )
        block = tile.m_block * plan.num_mma_warpgroups + warpgroup_index
        cute.copy(tensors.o.atom, from_smem, to_rows[None, block])
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
