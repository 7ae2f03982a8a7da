"""A tile of a matrix product by TMA and wgmma, with bugs to plant: see docs/own_kernel.md.

python docs/examples/tutorial_kernel.py            right
python docs/examples/tutorial_kernel.py bytes      expects twice the bytes that come
python docs/examples/tutorial_kernel.py wait       does not wait for the copies
python docs/examples/tutorial_kernel.py registers  reads the result before it is there
python docs/examples/tutorial_kernel.py scale      computes something else
"""

import sys

import cutlass
import cutlass.cute as cute
import torch
from cutlass import memory, tensor_utils
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import from_dlpack
from cutlass.utils import hopper_helpers

from fa3 import emulator

TILE = 64
BYTES = 2 * TILE * TILE * 2  # of both operands, in fp16


@cute.kernel
def _product(mma, load_a, mA, load_b, mB, mC, layouts, bug: cutlass.Constexpr[str]):  # noqa: PLR0913
    t, warp = cute.arch.thread_idx()[0], cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = memory.SmemAllocator()
    arrived = smem.allocate_array(cutlass.Int64, 1)
    sA, sB = (
        smem.allocate_tensor(cutlass.Float16, x.outer, byte_alignment=1024, swizzle=x.inner)
        for x in layouts
    )
    if t == 0:
        cute.arch.mbarrier_init(arrived, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()

    # One warp asks for both tiles; the mbarrier completes when all their bytes are there.
    if warp == 0:
        with cute.arch.elect_one():
            expected = 2 * BYTES if bug == "bytes" else BYTES
            cute.arch.mbarrier_arrive_and_expect_tx(arrived, expected)
        for atom, tensor, shared in ((load_a, mA, sA), (load_b, mB, sB)):
            s, g = cpasync.tma_partition(
                atom,
                0,
                cute.make_layout(1),
                cute.group_modes(shared, 0, 2),
                cute.group_modes(cute.local_tile(tensor, (TILE, TILE), (0, 0)), 0, 2),
            )
            cute.copy(atom, g, s[None, 0], tma_bar_ptr=arrived)
    if cutlass.const_expr(bug != "wait"):
        cute.arch.mbarrier_wait(arrived, 0)

    # All four warps issue the products, which run by themselves until wait_group.
    mine = mma.get_slice(t)
    rA = mma.make_fragment_A(mine.partition_A(sA))
    rB = mma.make_fragment_B(mine.partition_B(sB))
    gC = mine.partition_C(mC)
    acc = cute.make_rmem_tensor(gC.shape, cutlass.Float32)
    warpgroup.fence()
    mma.set(warpgroup.Field.ACCUMULATE, False)
    for k in cutlass.range_constexpr(cute.size(rA, mode=[2])):
        cute.gemm(mma, acc, rA[None, None, k, 0], rB[None, None, k, 0], acc)
        mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()
    if cutlass.const_expr(bug != "registers"):
        warpgroup.wait_group(0)

    scale = cutlass.Float32(2.0 if bug == "scale" else 0.125)
    for i in cutlass.range_constexpr(cute.size(acc)):
        gC[i] = acc[i] * scale
    emulator.watch("acc", acc)
    emulator.watch("scale", scale)


@cute.jit
def product(mA: cute.Tensor, mB: cute.Tensor, mC: cute.Tensor, bug: cutlass.Constexpr[str]):
    """C (64, 64) fp32 = A (64, 64) B^T (64, 64) / 8, of fp16."""
    shape, half = (TILE, TILE, TILE), mA.element_type
    row, k_major = tensor_utils.LayoutEnum.ROW_MAJOR, OperandMajorMode.K
    mma = hopper_helpers.make_trivial_tiled_mma(
        half, half, k_major, k_major, cutlass.Float32, (1, 1, 1), (TILE, TILE)
    )
    layouts = (
        hopper_helpers.make_smem_layout_a(row, shape, half, 1),
        hopper_helpers.make_smem_layout_b(row, shape, half, 1),
    )
    (load_a, tensor_a), (load_b, tensor_b) = (
        cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), x, cute.slice_(y, (None, None, 0)), (TILE, TILE)
        )
        for x, y in ((mA, layouts[0]), (mB, layouts[1]))
    )
    _product(mma, load_a, tensor_a, load_b, tensor_b, mC, layouts, bug).launch(
        grid=[1, 1, 1], block=[128, 1, 1]
    )


def main(bug: str = "") -> None:
    emulator.install()
    torch.manual_seed(0)
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64)
    tensors = [from_dlpack(x, assumed_align=16) for x in (a, b, c)]
    kernel = cute.compile(product, *tensors, bug)
    with emulator.options(checks=emulator.ALL_CHECKS):
        kernel(*tensors)
    wanted = a.float() @ b.float().T / 8
    acc, scale = (emulator.watched[name].of() for name in ("acc", "scale"))  # (threads, elements)
    print(f"acc {acc.shape}: thread 0 has {acc[0, 0]:.4f}, times scale {scale[0, 0]:g}")
    print(f"expected {wanted[0, 0]:.4f}, found {c[0, 0]:.4f}")
    torch.testing.assert_close(c, wanted)
    print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
