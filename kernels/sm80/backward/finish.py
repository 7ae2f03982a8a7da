"""The kernel that ends a backward pass: dQ from fp32 sums to 16 bits, times softmax_scale."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.memory import SmemAllocator

from ..mma import ROWS, Lanes, SharedResult, accumulator, columns_of, first_chunk_of
from .store import store_rows, write


class Finish:
    """One CTA per block of queries of a head, whose threads have what those of backward added."""

    def __init__(self, plan: Any):
        self.plan = plan

    @cute.jit
    def __call__(
        self, sums: cute.Tensor, dq: cute.Tensor, sequences: Any, softmax_scale: Float32, stream
    ):
        """sums: (tile_m * tile_d, m_blocks, h_q, b) fp32; dq: (s_q, d, h_q, b)."""
        _, m_blocks, heads, batches = sums.shape
        self.kernel(sums, dq, sequences, softmax_scale).launch(
            grid=(m_blocks, heads, batches),
            block=(self.plan.config.num_threads, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, sums: cute.Tensor, dq: cute.Tensor, sequences: Any, softmax_scale: Float32):
        plan = self.plan
        block, head, entry = cute.arch.block_idx()
        queries, m_block = sequences.query_block(entry, block, plan.config.tile_m)
        if cutlass.const_expr(plan.signature.is_ragged):
            if m_block >= 0 and m_block * plan.config.tile_m < queries.length:
                self._finish(sums, dq, softmax_scale, queries, m_block)
        else:
            self._finish(sums, dq, softmax_scale, queries, m_block)

    @cute.jit
    def _finish(
        self, sums: cute.Tensor, dq: cute.Tensor, softmax_scale: Float32, queries: Any, m_block: Any
    ):
        plan, config, layout = self.plan, self.plan.config, self.plan.q
        thread = cute.arch.thread_idx()[0]
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        block, head, entry = cute.arch.block_idx()
        space = SmemAllocator().allocate_array(plan.element, layout.elements, byte_alignment=1024)
        row_warps, column_warps = config.dq_warps(plan.signature.head_dim)
        columns = columns_of(layout, column_warps)
        rows = config.tile_m // row_warps
        parts = tuple(accumulator(16 * len(columns)) for _ in range(rows // ROWS))
        count = sum(cute.size(acc) for acc in parts)
        own = cute.make_tensor(
            sums[None, block, head, entry].iterator + thread,
            cute.make_layout(count, stride=config.num_threads),
        )
        _read(own, parts)
        chunk = first_chunk_of(layout, column_warps, warp // row_warps)
        lanes = Lanes.of(layout.columns, lane).result ^ chunk
        result = SharedResult.beside(layout, space, lanes, warp % row_warps * rows)
        write(parts, result, columns, plan.element, softmax_scale)
        cute.arch.sync_threads()
        matrix, first = queries.matrix(dq, head), m_block * config.tile_m
        store_rows(matrix, layout, space, first, queries.length, thread, config.num_threads)


def _read(source: cute.Tensor, parts: tuple):
    """(count,) -> registers of the parts, one after another."""
    for m, part in enumerate(parts):
        for i in range(cute.size(part)):
            part[i] = source[m * cute.size(part) + i]
