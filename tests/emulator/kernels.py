"""Small kernels for the tests of the emulator, each with switches that break it on purpose."""

import cutlass
import cutlass.cute as cute
from cutlass import memory, tensor_utils
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.utils import hopper_helpers

TILE = 64  # rows and columns of every tile below
THREADS = 128
TILE_BYTES = TILE * TILE * 2


@cute.kernel
def _add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, excess: cutlass.Constexpr[int]):
    i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
    if i < a.shape[0]:
        c[i + excess] = a[i] + b[i]


@cute.jit
def add(
    a: cute.Tensor,
    b: cute.Tensor,
    c: cute.Tensor,
    stream,
    excess: cutlass.Constexpr[int] = 0,
):
    """c[i + excess] = a[i] + b[i]; every excess but 0 leaves c."""
    blocks = (a.shape[0] + THREADS - 1) // THREADS
    _add(a, b, c, excess).launch(grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def _reverse(a: cute.Tensor, sync: cutlass.Constexpr[int]):
    t = cute.arch.thread_idx()[0]
    s = memory.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout(THREADS))
    if cutlass.const_expr(sync != -1) or t < THREADS // 2:
        s[t] = a[t]
    if cutlass.const_expr(sync != -2):
        cute.arch.sync_threads()
    a[t] = s[THREADS - 1 - t]


@cute.jit
def reverse(a: cute.Tensor, stream, sync: cutlass.Constexpr[int] = 0):
    """a reversed through shared memory; sync -1 leaves half of it unwritten, -2 does not wait."""
    _reverse(a, sync).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def _tickets(counter: cute.Tensor, out: cute.Tensor):
    t = cute.arch.thread_idx()[0]
    ticket = memory.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout(1))
    if t == 0:
        ticket[0] = cute.arch.atomic_add(counter.iterator.llvm_ptr, cutlass.Int32(1))
    cute.arch.sync_threads()
    while ticket[0] < out.shape[0]:
        mine = ticket[0]
        cute.arch.sync_threads()
        if t == 0:
            out[mine] = cute.arch.block_idx()[0] + 1
            ticket[0] = cute.arch.atomic_add(counter.iterator.llvm_ptr, cutlass.Int32(1))
        cute.arch.sync_threads()


@cute.jit
def tickets(counter: cute.Tensor, out: cute.Tensor, blocks: cutlass.Int32, stream):
    """A dynamic scheduler: blocks draw tickets and sign the entry of out they got."""
    _tickets(counter, out).launch(grid=[blocks, 1, 1], block=[32, 1, 1], stream=stream)


@cute.kernel
def _double(
    load: cute.CopyAtom,
    source: cute.Tensor,
    store: cute.CopyAtom,
    target: cute.Tensor,
    broken: cutlass.Constexpr[str],
):
    t, warp = cute.arch.thread_idx()[0], cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = memory.SmemAllocator()
    full = smem.allocate_array(cutlass.Int64, 1)
    layout = cute.make_layout((TILE, TILE), stride=(TILE, 1))
    tile = smem.allocate_tensor(cutlass.Float16, layout, byte_alignment=128)
    if t == 0:
        cute.arch.mbarrier_init(full, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    block = (cute.arch.block_idx()[0], cute.arch.block_idx()[1])
    s, g = cpasync.tma_partition(
        load,
        0,
        cute.make_layout(1),
        cute.group_modes(tile, 0, 2),
        cute.group_modes(cute.local_tile(source, (TILE, TILE), block), 0, 2),
    )
    so, go = cpasync.tma_partition(
        store,
        0,
        cute.make_layout(1),
        cute.group_modes(tile, 0, 2),
        cute.group_modes(cute.local_tile(target, (TILE, TILE), block), 0, 2),
    )
    if warp == 0:
        with cute.arch.elect_one():
            expected = TILE_BYTES * 2 if broken == "expect_tx" else TILE_BYTES
            cute.arch.mbarrier_arrive_and_expect_tx(full, expected)
        cute.copy(load, g, s, tma_bar_ptr=full)
    if cutlass.const_expr(broken != "wait"):
        cute.arch.mbarrier_wait(full, 0)
    for i in cutlass.range_constexpr(TILE * TILE // THREADS):
        row, column = (i * THREADS + t) // TILE, t % TILE
        tile[row, column] = tile[row, column] * cutlass.Float16(2)
    if cutlass.const_expr(broken != "fence"):
        cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_threads()
    if warp == 0:
        cute.copy(store, so, go)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def double(
    source: cute.Tensor,
    target: cute.Tensor,
    stream,
    broken: cutlass.Constexpr[str] = "",
):
    """target = 2 * source, fp16, through TMA both ways.

    broken: "fence", "wait" leave that out; "expect_tx" gets it wrong.
    """
    layout = cute.make_layout((TILE, TILE), stride=(TILE, 1))
    load, s = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), source, layout, (TILE, TILE)
    )
    store, d = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), target, layout, (TILE, TILE)
    )
    rows, columns = source.shape
    grid = [(rows + TILE - 1) // TILE, (columns + TILE - 1) // TILE, 1]
    _double(load, s, store, d, broken).launch(grid=grid, block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def _gemm(
    mma: cute.TiledMma,
    load_a: cute.CopyAtom,
    mA: cute.Tensor,
    load_b: cute.CopyAtom,
    mB: cute.Tensor,
    mC: cute.Tensor,
    layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout,
    broken: cutlass.Constexpr[str],
):
    t, warp = cute.arch.thread_idx()[0], cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = memory.SmemAllocator()
    full = smem.allocate_array(cutlass.Int64, 1)
    sA, sB = (
        smem.allocate_tensor(cutlass.Float16, x.outer, byte_alignment=1024, swizzle=x.inner)
        for x in (layout_a, layout_b)
    )
    if t == 0:
        cute.arch.mbarrier_init(full, 1)
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if warp == 0:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, 2 * TILE_BYTES)
        for atom, tensor, shared in ((load_a, mA, sA), (load_b, mB, sB)):
            s, g = cpasync.tma_partition(
                atom,
                0,
                cute.make_layout(1),
                cute.group_modes(shared, 0, 2),
                cute.group_modes(cute.local_tile(tensor, (TILE, TILE), (0, 0)), 0, 2),
            )
            cute.copy(atom, g, s[None, 0], tma_bar_ptr=full)
    cute.arch.mbarrier_wait(full, 0)
    thread = mma.get_slice(t)
    rA = mma.make_fragment_A(thread.partition_A(sA))
    rB = mma.make_fragment_B(thread.partition_B(sB))
    gC = thread.partition_C(mC)
    acc = cute.make_rmem_tensor(gC.shape, cutlass.Float32)
    warpgroup.fence()
    mma.set(warpgroup.Field.ACCUMULATE, False)
    for k in cutlass.range_constexpr(cute.size(rA, mode=[2])):
        cute.gemm(mma, acc, rA[None, None, k, 0], rB[None, None, k, 0], acc)
        mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()
    if cutlass.const_expr(broken != "wait_group"):
        warpgroup.wait_group(0)
    for i in cutlass.range_constexpr(cute.size(acc)):
        gC[i] = acc[i]


@cute.jit
def gemm(
    mA: cute.Tensor,
    mB: cute.Tensor,
    mC: cute.Tensor,
    stream,
    majors: cutlass.Constexpr[str] = "kk",
    broken: cutlass.Constexpr[str] = "",
):
    """C (64, 64) fp32 = A (64, 64) B^T (64, 64) of fp16, by TMA and wgmma.

    majors: contiguous modes of A (k or m) and B (k or n); broken "wait_group" leaves that out.
    """
    kinds = [
        tensor_utils.LayoutEnum.ROW_MAJOR if m == "k" else tensor_utils.LayoutEnum.COL_MAJOR
        for m in majors
    ]
    modes = [OperandMajorMode.K if m == "k" else OperandMajorMode.MN for m in majors]
    mma = hopper_helpers.make_trivial_tiled_mma(
        mA.element_type, mB.element_type, *modes, cutlass.Float32, (1, 1, 1), (TILE, TILE)
    )
    shape = (TILE, TILE, TILE)
    layouts = (
        hopper_helpers.make_smem_layout_a(kinds[0], shape, mA.element_type, 1),
        hopper_helpers.make_smem_layout_b(kinds[1], shape, mB.element_type, 1),
    )
    load = cpasync.CopyBulkTensorTileG2SOp()
    atom_a, tensor_a = cpasync.make_tiled_tma_atom(
        load, mA, cute.slice_(layouts[0], (None, None, 0)), (TILE, TILE)
    )
    atom_b, tensor_b = cpasync.make_tiled_tma_atom(
        load, mB, cute.slice_(layouts[1], (None, None, 0)), (TILE, TILE)
    )
    _gemm(mma, atom_a, tensor_a, atom_b, tensor_b, mC, *layouts, broken).launch(
        grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )
