"""Circular shared-memory buffers between the producer warp and the consumer warpgroups."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, pipeline
from cutlass.cute.nvgpu import cpasync

from ..sequence import PagedSpan, RaggedSpan, Span
from ..tensors import TmaOperand


def swizzled(pointer: cute.Pointer, layout: cute.ComposedLayout) -> cute.Tensor:
    """A buffer whose swizzle sits in its pointer, as TMA and wgmma descriptors want it."""
    aligned = pointer.align(1024)
    return cute.make_tensor(cute.recast_ptr(aligned, layout.inner), layout.outer)


@dataclass(frozen=True)
class Ring:
    """A buffer of several stages and the full / empty mbarriers of each stage.

    full:  1 arrival (the producer, expecting the stage's bytes) and the bytes written by TMA; or,
           where warps fill the ring (written_by), 1 arrival per producer warp.
    empty: 1 arrival per consumer warp.

    The CTAs of a cluster may share what they load: each producer brings its part of a block into
    that stage of all CTAs.  A full barrier still counts the bytes of a whole block; an empty one
    counts the consumer warps of all CTAs, each of which arrives at every CTA's.
    """

    buffer: cute.Tensor  # (rows, columns, num_stages)
    pipeline: pipeline.PipelineAsync
    num_ctas: cutlass.Constexpr[int] = 1  # that share it

    @staticmethod
    def of(
        buffer: cute.Tensor, barriers: cute.Pointer, num_consumer_warps: int, num_ctas: int = 1
    ) -> "Ring":
        num_stages = cute.size(buffer, mode=[2])
        stage = cute.select(buffer.layout, mode=[0, 1])
        one = pipeline.CooperativeGroup(pipeline.Agent.Thread, 1)
        warps = pipeline.CooperativeGroup(pipeline.Agent.Thread, num_ctas * num_consumer_warps)
        shared = {}
        if num_ctas > 1:  # one lane of a consumer warp arrives at each CTA
            layout = cute.make_layout((1, num_ctas, 1, 1))
            shared = {"cta_layout_vmnk": layout, "mcast_mode_mn": (0, 1)}
        return Ring(
            buffer,
            pipeline.PipelineTmaAsync.create(
                barrier_storage=barriers,
                num_stages=num_stages,
                producer_group=one,
                consumer_group=warps,
                tx_count=cute.size_in_bytes(buffer.element_type, stage),
                defer_sync=True,
                **shared,
            ),
            num_ctas,
        )

    @staticmethod
    def written_by(
        num_producer_warps: int,
        buffer: cute.Tensor,
        barriers: cute.Pointer,
        num_consumer_warps: int,
    ) -> "Ring":
        producers, consumers = (
            pipeline.CooperativeGroup(pipeline.Agent.Thread, count)
            for count in (num_producer_warps, num_consumer_warps)
        )
        return Ring(
            buffer,
            WarpPipeline.create(
                barrier_storage=barriers,
                num_stages=cute.size(buffer, mode=[2]),
                producer_group=producers,
                consumer_group=consumers,
                defer_sync=True,
            ),
        )

    def producer(self) -> pipeline.PipelineProducer:
        return self.pipeline.make_producer()

    def consumer(self) -> pipeline.PipelineConsumer:
        return self.pipeline.make_consumer()

    def slot_before(self, consumer: pipeline.PipelineConsumer):
        """The slot that a consumer waited for last."""
        num_stages = self.pipeline.num_stages
        return (consumer.current_handle().index + num_stages - 1) % num_stages

    def release(self, slot):
        """Give a slot back that was waited for but not released at once."""
        state = pipeline.PipelineState(self.pipeline.num_stages, Int32(0), slot, Int32(0))
        self.pipeline.consumer_release(state)

    def filler(
        self,
        operand: TmaOperand,
        tile_shape,
        span: Span | RaggedSpan | PagedSpan,
        head,
        row_mode: int,
    ):
        """fill(block, handle): TMA block `block` of the rows of a head into a stage."""
        if isinstance(span, PagedSpan):
            return self._filler_of_pages(operand, tile_shape, span, head, row_mode)
        head_tensor = span.tiled(operand.tensor, head, row_mode)
        coordinate = (None, 0) if row_mode == 0 else (0, None)
        blocks = cute.local_tile(head_tensor, tile_shape, coordinate)  # (rows, columns, num_blocks)
        part, shared = 0, {}
        if self.num_ctas > 1:
            part = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
            shared = {"mcast_mask": cutlass.Int16((1 << self.num_ctas) - 1)}
        to_stage, from_block = cpasync.tma_partition(
            operand.atom,
            part,
            cute.make_layout(self.num_ctas),
            cute.group_modes(self.buffer, 0, 2),
            cute.group_modes(blocks, 0, 2),
        )

        def fill(block, handle):
            cute.copy(
                operand.atom,
                from_block[None, block],
                to_stage[None, handle.index],
                tma_bar_ptr=handle.barrier,
                **shared,
            )

        return fill

    def _filler_of_pages(self, operand, tile_shape, span: PagedSpan, head, row_mode: int):
        """The same, as many rows at a time as surely share a page; each lane looks one page up."""
        num_rows = span.rows_at_once
        shape = part_of(tile_shape, row_mode, num_rows)
        stages = cute.zipped_divide(self.buffer, shape)  # (part, (rows, columns, num_stages))
        num_parts = tile_shape[row_mode] // num_rows

        @cute.jit
        def fill(block, handle):
            first = block * tile_shape[row_mode]
            entries = span.entry_of(first + num_rows * cute.arch.lane_idx())
            for i in cutlass.range(num_parts, unroll=1):
                entry = cute.arch.shuffle_sync(entries, i)
                rows = span.tiled(operand.tensor, head, row_mode, first + num_rows * i, entry)
                place = (i, 0, handle.index) if row_mode == 0 else (0, i, handle.index)
                to_stage, from_page = cpasync.tma_partition(
                    operand.atom,
                    0,
                    cute.make_layout(1),
                    stages[None, place],
                    cute.group_modes(cute.local_tile(rows, shape, (0, 0)), 0, 2),
                )
                cute.copy(operand.atom, from_page, to_stage, tma_bar_ptr=handle.barrier)

        return fill


def part_of(tile_shape, row_mode: int, num_rows: int) -> tuple:
    """The shape of a part of a tile that has so many of its rows."""
    columns = tile_shape[1 - row_mode]
    return (num_rows, columns) if row_mode == 0 else (columns, num_rows)


@dataclass(frozen=True)
class WarpPipeline(pipeline.PipelineAsync):
    """Warps that write on one side, warps that read by wgmma alone on the other.

    Each arrives once: a writer when all its lanes have come so far; a reader's lanes all know that
    their wgmmas are over once one does.
    """

    @staticmethod
    def create(**options) -> "WarpPipeline":
        made = pipeline.PipelineAsync.create(**options)
        return WarpPipeline(**{name: getattr(made, name) for name in made.__dataclass_fields__})

    def producer_commit(self, state, *, loc=None, ip=None):
        """After fence_view_async_shared(), where the consumer is wgmma."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            super().producer_commit(state, loc=loc, ip=ip)

    def consumer_release(self, state, *, loc=None, ip=None):
        with cute.arch.elect_one():
            super().consumer_release(state, loc=loc, ip=ip)


@dataclass(frozen=True)
class FwdRings:
    q: Ring  # 1 stage
    k: Ring
    v: Ring  # as the consumers multiply it
    v_by_keys: Ring | None = None  # as TMA brings it: before transpose.py, or widen.py
    k_bytes: Ring | None = None  # the same of K, before widen.py

    @property
    def v_loaded(self) -> Ring:
        """What TMA fills."""
        return self.v if self.v_by_keys is None else self.v_by_keys

    @property
    def k_loaded(self) -> Ring:
        return self.k if self.k_bytes is None else self.k_bytes
