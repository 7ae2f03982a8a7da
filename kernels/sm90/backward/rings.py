"""Shared memory of the backward kernel: K and V of a tile, rings of Q and dO with their numbers."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, pipeline
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from ...barriers import WARPGROUP
from ...bwd_arguments import NUM_PARTS, PARTS
from ...bwd_config import DELTA_DEPTH
from ..rings import Ring, swizzled
from .dq import dq_buffer
from .products import BwdSmem, parts_layout


@dataclass(frozen=True)
class RowsRing:
    """A ring of row blocks; each stage has numbers of the rows, too: lse of Q, delta of dO."""

    ring: Ring  # (tile_m, columns, num_stages)
    numbers: cute.Tensor  # (tile_m, num_stages) fp32; or (8 * tile_m, num_stages) of delta's parts

    @staticmethod
    def of(buffer: cute.Tensor, numbers: cute.Tensor, barriers, num_consumer_warps) -> "RowsRing":
        stage = cute.select(buffer.layout, mode=[0, 1])
        column = cute.select(numbers.layout, mode=[0])
        one, warps = (
            pipeline.CooperativeGroup(pipeline.Agent.Thread, count)
            for count in (1, num_consumer_warps)
        )
        made = pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers,
            num_stages=cute.size(buffer, mode=[2]),
            producer_group=one,
            consumer_group=warps,
            tx_count=cute.size_in_bytes(buffer.element_type, stage)
            + cute.size_in_bytes(numbers.element_type, column),
            defer_sync=True,
        )
        return RowsRing(Ring(buffer, made), numbers)

    @property
    def buffer(self) -> cute.Tensor:
        return self.ring.buffer

    def producer(self) -> pipeline.PipelineProducer:
        return self.ring.producer()

    def consumer(self) -> pipeline.PipelineConsumer:
        return self.ring.consumer()

    def filler(self, operand, tile_shape, span, head, stats: cute.Tensor):
        """fill(block, handle): the rows by TMA, their numbers of stats (count, blocks) in bulk."""
        fill_rows = self.ring.filler(operand, tile_shape, span, head, 0)
        atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), self.numbers.element_type)

        @cute.jit
        def fill(block, handle):
            fill_rows(block, handle)
            with cute.arch.elect_one():
                cute.copy(
                    atom,
                    stats[None, block],
                    self.numbers[None, handle.index],
                    mbar_ptr=handle.barrier,
                )

        return fill

    def of_thread(self, stage, first, count: int) -> cute.Tensor:
        """(count / 4,) numbers of the columns that a thread has of a transposed accumulator.

        first: the first of them, even; count: columns of the accumulator.
        """
        column = self.numbers[None, stage].iterator + first
        pairs = cute.make_layout((2, count // 8), stride=(1, 8))
        source = cute.make_tensor(column.align(8), pairs)
        numbers = cute.make_rmem_tensor((2, count // 8), Float32)
        cute.autovec_copy(source, numbers)
        return cute.make_tensor(numbers.iterator, cute.make_layout(count // 4))

    def of_rows(self, stage, first) -> cute.Tensor:
        """(2, 1) numbers of the rows first and first + 8, a thread's of an accumulator."""
        numbers = cute.make_rmem_tensor((2, 1), Float32)
        for r in range(2):
            numbers[r, 0] = self.numbers[first + 8 * r, stage]
        return numbers


@dataclass(frozen=True)
class BwdRings:
    k: Ring  # 1 stage
    v: Ring  # 1 stage
    q: RowsRing
    do: RowsRing
    ds: cute.Tensor  # (tile_m, tile_n, ds_buffers)
    p: cute.Tensor | None  # the same, where the warpgroups share the keys
    dq: cute.Tensor | None  # dq.DqSums.buffer
    minus_one: cute.Tensor | None  # (64, DELTA_DEPTH) bf16: times the parts of a query minus delta
    delta: cute.Tensor | None  # (tile_m, DELTA_DEPTH, num_stages) bf16: do.numbers, beside zeros

    @staticmethod
    def of(plan, allocator: SmemAllocator) -> "BwdRings":
        layouts, config = BwdSmem.of(plan.signature, plan.config), plan.config
        num_warps = 4 * config.num_mma_warpgroups

        def space(layout):
            count = cute.cosize(layout)
            pointer = allocator.allocate_array(plan.element, count, byte_alignment=1024)
            return swizzled(pointer, layout)

        def barriers(num_stages):
            return allocator.allocate_array(cutlass.Int64, 2 * num_stages)

        def numbers(element, layout):
            pointer = allocator.allocate_array(element, cute.cosize(layout), byte_alignment=128)
            return cute.make_tensor(pointer, layout)

        def rows(buffer, numbers):
            num_stages = cute.size(buffer, mode=[2])
            return RowsRing.of(buffer, numbers, barriers(num_stages), num_warps)

        # What is aligned to 1024 bytes comes first, or gaps would be left.
        k, v, q, do, ds = (
            space(x) for x in (layouts.k, layouts.v, layouts.q, layouts.do, layouts.ds)
        )
        lse = numbers(Float32, cute.make_layout((config.tile_m, config.num_stages)))
        minus_one = parts = None
        if config.delta_in_parts:
            minus_one = numbers(BFloat16, parts_layout(64, 1))[None, None, 0]
            parts = numbers(BFloat16, parts_layout(config.tile_m, config.stages_of_do))
            written, stage = PARTS * config.tile_m, DELTA_DEPTH * config.tile_m
            layout = cute.make_layout((written, config.stages_of_do), stride=(1, stage))
            delta = cute.make_tensor(parts.iterator, layout)
        else:
            delta = numbers(Float32, cute.make_layout((config.tile_m, config.stages_of_do)))
        return BwdRings(
            p=None if config.splits_keys else space(layouts.ds),
            dq=dq_buffer(plan, allocator),
            k=Ring.of(k, barriers(1), 1),
            v=Ring.of(v, barriers(1), 1),
            q=rows(q, lse),
            do=rows(do, delta),
            ds=ds,
            minus_one=minus_one,
            delta=parts,
        )

    @cute.jit
    def start(self, plan: cutlass.Constexpr, thread):
        """What is read before anybody wrote it, by the CTA's threads ahead of a barrier of them.

        The fence serves the mbarriers, too, which the same threads have initialised.
        """
        if cutlass.const_expr(plan.config.delta_in_parts):
            rows, tile_m = cute.size(self.minus_one, mode=[0]), plan.config.tile_m
            if thread < rows:
                _store(self.minus_one.iterator, thread, [-1.0] * NUM_PARTS)
                _store(self.minus_one.iterator, rows + thread, [])
            if thread < tile_m:
                for stage in cutlass.range_constexpr(plan.config.stages_of_do):
                    _store(self.delta[None, None, stage].iterator, tile_m + thread, [])
        if cutlass.const_expr(plan.config.splits_keys and plan.signature.with_dq):
            # The first product of dQ is of no block: of the buffer that no step has filled.
            size = plan.config.tile_m * plan.config.tile_n
            if thread < WARPGROUP:
                for i in cutlass.range_constexpr(size // (PARTS * WARPGROUP)):
                    _store(self.ds[None, None, 1].iterator, i * WARPGROUP + thread, [])
        cute.arch.fence_view_async_shared()


def _store(first: cute.Pointer, index, numbers: list[float]):
    """To the index-th 16 bytes: these numbers in 16 bits, and zeros."""
    values = cute.make_rmem_tensor(PARTS, first.dtype)
    values.fill(0.0)
    for i, number in enumerate(numbers):
        values[i] = Float32(number).to(first.dtype)
    target = cute.make_tensor((first + PARTS * index).align(16), cute.make_layout(PARTS))
    cute.autovec_copy(values, target)
