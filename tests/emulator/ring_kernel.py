"""A warp-specialised kernel, as attention kernels are, with a switch for each way to break it.

    out[i] = a[i] (2 x[i])^T          per tile i, fp16

One producer warp loads tiles of x by TMA into a ring of two stages.  A consumer warpgroup doubles
a tile in place, multiplies it (wgmma, a from registers), gives the stage back, and stores the
product by TMA from a buffer of its own.

full[stage]:  1 arrival, of the producer, and the bytes of a tile.
empty[stage]: 1 arrival per consumer warp.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

M, N, K = 64, 16, 16  # of a tile
STAGES = 2
CONSUMERS = 128  # threads; the producer is one more warp
TILE_BYTES = N * K * 2


@dataclass(frozen=True)
class Ring:
    """Stages (N, K, STAGES) of shared memory, their barriers, and how the ring is broken."""

    stages: cute.Tensor
    full: cute.Pointer
    empty: cute.Pointer
    broken: str

    def init(self):
        """By one thread."""
        arrivals = {"too few arrivals": 5, "too many arrivals": 3}.get(self.broken, 4)
        for stage in range(STAGES):
            cute.arch.mbarrier_init(self.full + stage, 1)
            cute.arch.mbarrier_init(self.empty + stage, arrivals)
        if self.broken == "second init":
            cute.arch.mbarrier_init(self.full, 1)
        if self.broken != "init fence":
            cute.arch.mbarrier_init_fence()


def _partition(atom, shared, tensor, shape):
    """Tiles of a tensor and of shared memory as a TMA atom takes them, one column per tile."""
    tiles = cute.local_tile(tensor, shape, (None, 0))
    return cpasync.tma_partition(
        atom,
        0,
        cute.make_layout(1),
        cute.group_modes(shared, 0, 2),
        cute.group_modes(tiles, 0, 2),
    )


@cute.jit
def _produce(ring: Ring, load: cute.CopyAtom, x: cute.Tensor, broken: cutlass.Constexpr[str]):
    to_stage, from_tile = _partition(load, ring.stages, x, (N, K))
    wrong = {"bytes too many": 64, "bytes too few": -64}.get(broken, 0)
    tiles = x.shape[0] // N + int(broken == "tile too many")
    for i in cutlass.range(tiles, unroll=1):
        stage, phase = i % STAGES, i // STAGES % 2
        if cutlass.const_expr(broken == "producer phase"):
            cute.arch.mbarrier_wait(ring.empty + stage, phase)
        elif cutlass.const_expr(broken != "lap"):
            cute.arch.mbarrier_wait(ring.empty + stage, phase ^ 1)
        full = ring.full + stage
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, TILE_BYTES + wrong)
        cute.copy(load, from_tile[None, i], to_stage[None, stage], tma_bar_ptr=full)


@cute.jit
def _release(ring: Ring, stage):
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(ring.empty + stage)


@cute.jit
def _await_tile(ring: Ring, stage, phase, broken: cutlass.Constexpr[str]):
    if cutlass.const_expr(broken == "consumer phase"):
        cute.arch.mbarrier_wait(ring.full + stage, phase ^ 1)
    elif cutlass.const_expr(broken != "consumer wait"):
        cute.arch.mbarrier_wait(ring.full + stage, phase)


@cute.jit
def _double(ring: Ring, stage, t, broken: cutlass.Constexpr[str]):
    """A stage, in place; then the tensor cores may read it."""
    for j in cutlass.range_constexpr(N * K // CONSUMERS):
        row, column = (j * CONSUMERS + t) // K, t % K
        ring.stages[row, column, stage] = ring.stages[row, column, stage] * cutlass.Float16(2)
    if cutlass.const_expr(broken != "operand fence"):
        cute.arch.fence_proxy("async.shared", space="cta")
    if cutlass.const_expr(broken != "operand barrier"):
        cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)


@cute.jit
def _multiply(mma: cute.TiledMma, acc, a_regs, b_regs, broken: cutlass.Constexpr[str]):
    """acc = a b^T, issued."""
    if cutlass.const_expr(broken != "wgmma fence"):
        warpgroup.fence()
    mma.set(warpgroup.Field.ACCUMULATE, broken == "accumulate")
    cute.gemm(mma, acc, a_regs, b_regs, acc)
    warpgroup.commit_group()


def _fetch(a_regs, tile_a, i):
    a_regs.store(tile_a[None, None, None, i % cute.size(tile_a, mode=[3])].load())


@cute.jit
def _store(store: cute.CopyAtom, to_tile, from_buffer, warp, broken: cutlass.Constexpr[str]):
    """The consumers' buffer to global memory, by warp 0."""
    if cutlass.const_expr(broken != "store fence"):
        cute.arch.fence_proxy("async.shared", space="cta")
    if cutlass.const_expr(broken != "store barrier"):
        cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)
    if warp == 0:
        cute.copy(store, from_buffer, to_tile)
        cute.arch.cp_async_bulk_commit_group()


@cute.jit
def _await_buffer(warp, broken: cutlass.Constexpr[str]):
    """Until the last store has read the buffer."""
    if cutlass.const_expr(broken != "store wait"):
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
    if cutlass.const_expr(broken != "wait barrier"):
        cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)


@cute.jit
def _finish(warp, broken: cutlass.Constexpr[str]):
    """Shared memory is there until the last store has read it."""
    if cutlass.const_expr(broken != "exit"):
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def _consume(ring: Ring, mma: cute.TiledMma, a, store, out, buffer, broken: cutlass.Constexpr[str]):
    t, warp = cute.arch.thread_idx()[0], cute.arch.make_warp_uniform(cute.arch.warp_idx())
    thread = mma.get_slice(t)
    tile_a = thread.partition_A(cute.local_tile(a, (M, K), (None, 0)))
    b_regs = mma.make_fragment_B(thread.partition_B(ring.stages))
    mine = thread.partition_C(buffer)
    from_buffer, to_tile = _partition(store, buffer, out, (M, N))
    acc = cute.make_rmem_tensor(mine.shape, cutlass.Float32)
    a_regs = cute.make_rmem_tensor(tile_a[None, None, None, 0].shape, cutlass.Float16)
    _fetch(a_regs, tile_a, 0)
    for i in cutlass.range(cute.size(tile_a, mode=[3]), unroll=1):
        stage, phase = i % STAGES, i // STAGES % 2
        _await_tile(ring, stage, phase, broken)
        _double(ring, stage, t, broken)
        _multiply(mma, acc, a_regs, b_regs[None, None, None, stage], broken)
        if cutlass.const_expr(broken == "early release"):
            _release(ring, stage)
        if cutlass.const_expr(broken == "early next a"):
            _fetch(a_regs, tile_a, i + 1)
        if cutlass.const_expr(broken != "wait group"):
            warpgroup.wait_group(0)
        if cutlass.const_expr(broken != "early release" and broken != "no release"):
            _release(ring, stage)
        _await_buffer(warp, broken)
        for j in cutlass.range_constexpr(cute.size(acc)):
            mine[j] = acc[j].to(cutlass.Float16)
        if cutlass.const_expr(broken != "early next a"):
            _fetch(a_regs, tile_a, i + 1)
        _store(store, to_tile[None, i], from_buffer, warp, broken)
    _finish(warp, broken)


@cute.kernel
def _ring(
    mma: cute.TiledMma,
    load: cute.CopyAtom,
    x: cute.Tensor,
    a: cute.Tensor,
    store: cute.CopyAtom,
    out: cute.Tensor,
    stages: cute.ComposedLayout,
    broken: cutlass.Constexpr[str],
):
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = memory.SmemAllocator()
    barriers = smem.allocate_array(cutlass.Int64, 2 * STAGES)
    buffer = smem.allocate_tensor(
        cutlass.Float16, cute.make_layout((M, N), stride=(N, 1)), byte_alignment=128
    )
    s = smem.allocate_tensor(
        cutlass.Float16, stages.outer, byte_alignment=1024, swizzle=stages.inner
    )
    if cutlass.const_expr(broken == "overlap"):
        buffer = cute.make_tensor(buffer.iterator - 64, buffer.layout)  # where the barriers are
    ring = Ring(s, barriers, barriers + STAGES, broken)
    if cute.arch.thread_idx()[0] == 0:
        ring.init()
    if cutlass.const_expr(broken != "init barrier"):
        cute.arch.sync_threads()
    if warp == CONSUMERS // 32:
        _produce(ring, load, x, broken)
    else:
        _consume(ring, mma, a, store, out, buffer, broken)


@cute.jit
def ring(
    a: cute.Tensor,
    x: cute.Tensor,
    out: cute.Tensor,
    stream,
    broken: cutlass.Constexpr[str] = "",
):
    """out (64 t, 16) = a (64 t, 16) times twice x (16 t, 16) transposed, tile by tile."""
    mma = hopper_helpers.make_trivial_tiled_mma(
        cutlass.Float16,
        cutlass.Float16,
        OperandMajorMode.K,
        OperandMajorMode.K,
        cutlass.Float32,
        (1, 1, 1),
        (M, N),
        warpgroup.OperandSource.RMEM,
    )
    stages = hopper_helpers.make_smem_layout_b(
        LayoutEnum.ROW_MAJOR, (M, N, K), cutlass.Float16, STAGES
    )
    load, x_tma = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), x, cute.slice_(stages, (None, None, 0)), (N, K)
    )
    store, out_tma = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), out, cute.make_layout((M, N), stride=(N, 1)), (M, N)
    )
    _ring(mma, load, x_tma, a, store, out_tma, stages, broken).launch(
        grid=[1, 1, 1], block=[CONSUMERS + 32, 1, 1], stream=stream
    )
