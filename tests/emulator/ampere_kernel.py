"""A kernel for sm_80, run in a process of its own: python -m tests.emulator.ampere_kernel"""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import memory
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.cute.runtime import from_dlpack

from fa3 import emulator

M, N, K = 16, 8, 16


@cute.kernel
def _product(
    mma: cute.TiledMma,
    a: cute.Tensor,
    b: cute.Tensor,
    c: cute.Tensor,
    broken: cutlass.Constexpr[bool],
):
    t = cute.arch.thread_idx()[0]
    smem = memory.SmemAllocator()
    sA = smem.allocate_tensor(cutlass.Float16, cute.make_layout((M, K), stride=(K, 1)), 16)
    sB = smem.allocate_tensor(cutlass.Float16, cute.make_layout((N, K), stride=(K, 1)), 16)
    chunk, at = (1, 8), (t // 2, t % 2)  # 16 bytes
    fetch = cute.make_copy_atom(cpasync.CopyG2SOp(), cutlass.Float16, num_bits_per_copy=128)
    a, b = cute.local_tile(a, chunk, at)[0, None], cute.local_tile(b, chunk, at)[0, None]
    cute.copy(fetch, a, cute.local_tile(sA, chunk, at)[0, None])
    if t < 2 * N:
        cute.copy(fetch, b, cute.local_tile(sB, chunk, at)[0, None])
    cute.arch.cp_async_commit_group()
    if cutlass.const_expr(not broken):
        cute.arch.cp_async_wait_group(0)
    cute.arch.sync_threads()
    thread = mma.get_slice(t)
    rA = mma.make_fragment_A(thread.partition_A(sA))
    rB = mma.make_fragment_B(thread.partition_B(sB))
    for shared, registers, make, matrices in (
        (sA, rA, cute.make_tiled_copy_A, 4),
        (sB, rB, cute.make_tiled_copy_B, 2),
    ):
        load = make(
            cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, matrices), cutlass.Float16), mma
        )
        mine = load.get_slice(t)
        cute.copy(load, mine.partition_S(shared), mine.retile(registers))
    gC = thread.partition_C(c)
    acc = cute.make_rmem_tensor(gC.shape, cutlass.Float32)
    acc.fill(0.0)
    cute.gemm(mma, acc, rA, rB, acc)
    for i in cutlass.range_constexpr(cute.size(acc)):
        gC[i] = acc[i]


@cute.jit
def product(
    a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, broken: cutlass.Constexpr[bool] = False
):
    """c (16, 8) = a (16, 16) b (8, 16)^T, by cp.async, ldmatrix and mma.sync of one warp."""
    op = warp.MmaF16BF16Op(cutlass.Float16, cutlass.Float32, (M, N, K))
    mma = cute.make_tiled_mma(op)
    _product(mma, a, b, c, broken).launch(grid=[1, 1, 1], block=[32, 1, 1])


def main():
    emulator.install("sm_80")
    a, b = torch.randint(-4, 5, (M, K)).half(), torch.randint(-4, 5, (N, K)).half()
    c = torch.zeros(M, N)
    arguments = [from_dlpack(x, assumed_align=16) for x in (a, b, c)]
    right, wrong = (cute.compile(product, *arguments, broken=x) for x in (False, True))

    assert ".target sm_80" in right.__ptx__

    def run():
        c.zero_()
        right(*arguments)
        return [c]

    (out,) = emulator.compare_schedules(run, range(2), checks=emulator.ALL_CHECKS)
    assert torch.equal(out, a.float() @ b.float().t())
    try:
        with emulator.options(checks=("race",)):
            wrong(*arguments)
    except emulator.Race as error:
        print(error)


if __name__ == "__main__":
    main()
