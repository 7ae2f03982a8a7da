"""Kernels of plain threads, with a switch for each way to break them (see also ring_kernel.py)."""

import cutlass
import cutlass.cute as cute
from cutlass import memory
from cutlass.cute.nvgpu import cpasync

THREADS = 128
VECTOR = 4  # elements that a thread copies
FAR = 1 << 20  # elements, outside of everything


@cute.jit
def _meet(t, broken: cutlass.Constexpr[str]):
    """All threads, at barrier 1."""
    if cutlass.const_expr(broken == "barrier for too many"):
        cute.arch.barrier(barrier_id=1, number_of_threads=2 * THREADS)
    elif cutlass.const_expr(broken == "barrier for too few"):
        if t < 96:
            cute.arch.barrier_arrive(barrier_id=1, number_of_threads=THREADS // 2)
    elif cutlass.const_expr(broken == "disagreement"):
        count = 2 * THREADS if t < THREADS // 2 else THREADS
        cute.arch.barrier(barrier_id=1, number_of_threads=count)
    elif cutlass.const_expr(broken != "no barrier"):
        cute.arch.barrier(barrier_id=1, number_of_threads=THREADS)


@cute.jit
def _add(total: cute.Tensor, lock: cute.Tensor, value, broken: cutlass.Constexpr[str]):
    """total[0] += value, by one thread of several CTAs."""
    at = lock.iterator.llvm_ptr
    one, zero = cutlass.Int32(1), cutlass.Int32(0)
    if cutlass.const_expr(broken != "not locked"):
        while cute.arch.atomic_cas(at, cmp=zero, val=one, sem="acquire") != 0:
            pass
    total[0] = total[0] + value
    if cutlass.const_expr(broken != "not locked" and broken != "not unlocked"):
        cute.arch.atomic_exch(at, zero, sem="release")


@cute.kernel
def _total(x: cute.Tensor, lock: cute.Tensor, total: cute.Tensor, broken: cutlass.Constexpr[str]):
    t = cute.arch.thread_idx()[0]
    mine = cute.arch.block_idx()[0] * THREADS + t
    sums = memory.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout(THREADS))
    if cutlass.const_expr(broken == "outside of x"):
        mine = mine + FAR
    if cutlass.const_expr(broken != "not written") or t < 96:
        sums[t] = x[mine]
    _meet(t, broken)
    if t < 32:
        other = t + (FAR if cutlass.const_expr(broken == "outside of sums") else 32)
        sums[t] = sums[t] + sums[other] + sums[t + 64] + sums[t + 96]
        if cutlass.const_expr(broken != "no warp barrier"):
            cute.arch.sync_warp()
        if t == 0:
            result = sums[0]
            for i in cutlass.range(1, 32, unroll=1):
                result = result + sums[i]
            _add(total, lock, result, broken)


@cute.jit
def total(
    x: cute.Tensor,
    lock: cute.Tensor,
    total: cute.Tensor,
    stream,
    broken: cutlass.Constexpr[str] = "",
):
    """total[0] += sum of x, int32: by warp 0 of a CTA for 128 elements, and then under a lock."""
    _total(x, lock, total, broken).launch(
        grid=[x.shape[0] // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
    )


@cute.kernel
def _mirror(x: cute.Tensor, out: cute.Tensor, broken: cutlass.Constexpr[str]):
    t = cute.arch.thread_idx()[0]
    layout = cute.make_layout(THREADS * VECTOR)
    start = memory.SmemAllocator().allocate_array(cutlass.Int32, THREADS * VECTOR + 1)
    if cutlass.const_expr(broken == "misaligned"):
        start = start + 1
    claimed = cute.make_ptr(
        cutlass.Int32, start.toint(), cute.AddressSpace.smem, assumed_align=4 * VECTOR
    )
    s = cute.make_tensor(claimed, layout)
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(), cutlass.Int32, num_bits_per_copy=VECTOR * cutlass.Int32.width
    )
    cute.copy(atom, cute.local_tile(x, (VECTOR,), (t,)), cute.local_tile(s, (VECTOR,), (t,)))
    cute.arch.cp_async_commit_group()
    if cutlass.const_expr(broken != "no wait"):
        cute.arch.cp_async_wait_group(0)
    cute.arch.sync_threads()
    for i in cutlass.range_constexpr(VECTOR):
        out[VECTOR * t + i] = s[VECTOR * (THREADS - t) - 1 - i]


@cute.jit
def mirror(x: cute.Tensor, out: cute.Tensor, stream, broken: cutlass.Constexpr[str] = ""):
    """out = x (512) int32, reversed, through shared memory and cp.async."""
    _mirror(x, out, broken).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def _registers(out: cute.Tensor, broken: cutlass.Constexpr[str]):
    t = cute.arch.thread_idx()[0]
    keep = {"too many": 40, "more": 240}.get(broken, 24)
    if t < THREADS:
        cute.arch.setmaxregister_decrease(keep)
    else:
        cute.arch.setmaxregister_increase(240)
    out[t] = t


@cute.jit
def registers(out: cute.Tensor, stream, broken: cutlass.Constexpr[str] = ""):
    """out (384) = 0, 1, ...; one warpgroup gives registers to two others."""
    _registers(out, broken).launch(grid=[1, 1, 1], block=[3 * THREADS, 1, 1], stream=stream)
