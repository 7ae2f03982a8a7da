"""Kernels that measure constants of the timing model: fa3/inspect/model/machine.py names them.

They follow the protocol of fa3.launch.jit, and count the cycles of the SM themselves.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from fa3.kernels.barriers import WARPGROUP
from fa3.kernels.sm90.wgmma import accumulator, issue_gemm

M, N, K = 64, 128, 64  # of a step: four wgmma
CHAINS = 8  # registers that a neighbour works on: its instructions do not wait for each other
BATCH = 64  # its instructions per turn of its loop
NEIGHBOURS = ("none", "fma", "mul", "ex2", "max", "lds")
REGISTERS_READ = {"fma": 3, "mul": 2, "ex2": 1, "max": 2, "lds": 1}
SUM_BYTES = 4096  # of a warp and turn
WAYS = ("red", "bulk")


@dataclass(frozen=True)
class ProbeSignature:
    kind: str  # one of NEIGHBOURS, or of WAYS


class Product:
    """One CTA: warpgroup 0 multiplies, warpgroup 1 executes instructions of one kind beside it."""

    def __init__(self, signature: ProbeSignature, config: None):
        self.kind = signature.kind

    def example_args(self) -> tuple:
        found = make_fake_tensor(Int64, (2,), (1,))
        numbers = make_fake_tensor(Float32, (4 * WARPGROUP,), (1,))
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return found, numbers, Int32(1), Int32(1), stream

    @cute.jit
    def __call__(self, found: cute.Tensor, numbers: cute.Tensor, steps, batches, stream):
        """found (2,) int64: cycles of each warpgroup. numbers (512,) fp32: 256 inputs, results."""
        self.kernel(found, numbers, steps, batches).launch(
            grid=(1, 1, 1), block=(2 * WARPGROUP, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, found: cute.Tensor, numbers: cute.Tensor, steps: Int32, batches: Int32):
        rows, tile = LayoutEnum.ROW_MAJOR, (M, N, K)
        allocator = SmemAllocator()
        a, b = (
            allocator.allocate_tensor(BFloat16, x.outer, byte_alignment=1024, swizzle=x.inner)
            for x in (
                hopper.make_smem_layout_a(rows, tile, BFloat16, 1),
                hopper.make_smem_layout_b(rows, tile, BFloat16, 1),
            )
        )
        thread = cute.arch.thread_idx()[0]
        for x in (a, b):
            flat = cute.make_tensor(
                cute.recast_ptr(x.iterator, dtype=BFloat16), cute.make_layout(cute.size(x))
            )
            for i in cutlass.range(thread, cute.size(flat), 2 * WARPGROUP, unroll=1):
                flat[i] = numbers[(7 * i) % (2 * WARPGROUP)].to(BFloat16)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        if cute.arch.make_warp_uniform(thread // WARPGROUP) == 0:
            self._multiply(a, b, found, numbers, steps, thread)
        else:
            self._beside(a, found, numbers, batches, thread)

    @cute.jit
    def _multiply(self, a, b, found, numbers, steps, thread):
        major = OperandMajorMode.K
        mma = hopper.make_trivial_tiled_mma(
            BFloat16, BFloat16, major, major, Float32, (1, 1, 1), (M, N)
        )
        own = mma.get_slice(0)
        a = mma.make_fragment_A(own.partition_A(a[None, None, 0]))
        b = mma.make_fragment_B(own.partition_B(b[None, None, 0]))
        acc = accumulator(N)
        acc.fill(0.0)
        start = cute.arch.clock64()
        for _ in cutlass.range(steps, unroll=1):
            warpgroup.fence()
            issue_gemm(mma, acc, a, b, accumulate=True)
            warpgroup.wait_group(1)
        warpgroup.wait_group(0)
        cycles = cute.arch.clock64() - start
        total = Float32(0.0)
        for i in cutlass.range_constexpr(cute.size(acc)):
            total += acc[i]
        numbers[2 * WARPGROUP + thread] = total
        if thread == 0:
            found[0] = cycles

    @cute.jit
    def _beside(self, a, found, numbers, batches, thread):
        values = cute.make_rmem_tensor(CHAINS, Float32)
        values.fill(numbers[thread])
        one, other = numbers[0], numbers[1]
        words = cute.make_tensor(
            cute.recast_ptr(a.iterator, dtype=Float32), cute.make_layout(cute.size(a) // 2)
        )
        start = cute.arch.clock64()
        if cutlass.const_expr(self.kind != "none"):
            for _ in cutlass.range(batches, unroll=1):
                for i in cutlass.range_constexpr(BATCH):
                    x = values[i % CHAINS]
                    if cutlass.const_expr(self.kind == "fma"):
                        x = x * one + other
                    elif cutlass.const_expr(self.kind == "mul"):
                        x = x * one
                    elif cutlass.const_expr(self.kind == "max"):
                        x = cute.arch.fmax(x, values[(i + 1) % CHAINS])
                    elif cutlass.const_expr(self.kind == "ex2"):
                        x = _ex2(x)
                    else:
                        place = words.iterator + (thread % 32 + 32 * (i % 16))
                        x = _loaded(place)
                    values[i % CHAINS] = x
        cycles = cute.arch.clock64() - start
        total = Float32(0.0)
        for i in cutlass.range_constexpr(CHAINS):
            total += values[i]
        numbers[2 * WARPGROUP + thread] = total
        if thread == WARPGROUP:
            found[1] = cycles


class Sums:
    """Every CTA adds fp32 to sums in L2, each warp to a place of its own."""

    def __init__(self, signature: ProbeSignature, config: None):
        self.kind = signature.kind

    def example_args(self) -> tuple:
        found = make_fake_tensor(Int64, (cute.sym_int32(),), (1,))
        sums = make_fake_tensor(Float32, (cute.sym_int32(),), (1,), assumed_align=16)
        return found, sums, Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, found: cute.Tensor, sums: cute.Tensor, turns, stream):
        """found (CTAs,) int64: cycles of each. sums (CTAs * 8 * SUM_BYTES / 4,) fp32."""
        self.kernel(found, sums, turns).launch(
            grid=(found.shape[0], 1, 1), block=(2 * WARPGROUP, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, found: cute.Tensor, sums: cute.Tensor, turns: Int32):
        thread, cta = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        count = SUM_BYTES // 4
        pointer = SmemAllocator().allocate_array(Float32, 8 * count, byte_alignment=128)
        buffer = cute.make_tensor(pointer, cute.make_layout(8 * count))
        for i in cutlass.range(thread, 8 * count, 2 * WARPGROUP, unroll=1):
            buffer[i] = Float32(1.0)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        target = sums.iterator + (8 * cta + warp) * count
        start = cute.arch.clock64()
        for _ in cutlass.range(turns, unroll=1):
            if cutlass.const_expr(self.kind == "red"):
                for i in cutlass.range_constexpr(count // 128):
                    one = Float32(1.0)
                    cute.arch.inline_ptx(
                        "red.relaxed.gpu.global.add.v4.f32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};",
                        read_only_args=[target + 128 * i + 4 * lane, one],
                    )
            else:
                with cute.arch.elect_one():
                    cute.arch.inline_ptx(
                        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 "
                        f"[{{$r0}}], [{{$r1}}], {SUM_BYTES};",
                        read_only_args=[target, buffer.iterator + warp * count],
                    )
                    cute.arch.cp_async_bulk_commit_group()
                cute.arch.cp_async_bulk_wait_group(0, read=True)
        if cutlass.const_expr(self.kind == "bulk"):
            cute.arch.cp_async_bulk_wait_group(0)
        cute.arch.sync_threads()
        if thread == 0:
            found[cta] = cute.arch.clock64() - start


def _ex2(x: Float32) -> Float32:
    return cute.arch.inline_ptx(
        "ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


def _loaded(place: cute.Pointer) -> Float32:
    return cute.arch.inline_ptx(
        "ld.volatile.shared.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[place]
    )
