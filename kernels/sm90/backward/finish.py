"""The kernel that ends a backward pass: dQ from fp32 sums to 16 bits, times softmax_scale."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from ...sequence import RaggedSequences, Sequences
from ...views import convert
from ..rings import swizzled
from ..tma import tma_store
from .dq import dq_of_thread, dq_registers
from .products import dq_layout, dq_mma, store


@dataclass(frozen=True)
class FinishTensors:
    sums: cute.Tensor  # (tile_m * tile_d, m_blocks, h_q, b) fp32, as the consumers add to it
    dq: Any  # TmaOperand of (s_q, d, h_q, b)
    sequences: Sequences | RaggedSequences


class Finish:
    """One CTA per block of queries of a head."""

    def __init__(self, plan: Any):
        self.plan = plan

    @cute.jit
    def __call__(
        self, sums: cute.Tensor, dq: cute.Tensor, sequences: Any, softmax_scale: Float32, stream
    ):
        plan = self.plan
        layout = dq_layout(plan.signature, plan.config)
        dq = tma_store(plan.lengths.view(dq, 0), layout, plan.q_tile)
        tensors = FinishTensors(sums, dq, sequences)
        _, m_blocks, heads, batches = sums.shape
        self.kernel(tensors, softmax_scale).launch(
            grid=(m_blocks, heads, batches), block=(plan.num_consumers, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: FinishTensors, softmax_scale: Float32):
        plan = self.plan
        block, head, entry = cute.arch.block_idx()
        queries, m_block = tensors.sequences.query_block(entry, block, plan.config.tile_m)
        if cutlass.const_expr(plan.signature.is_ragged):
            if m_block >= 0 and m_block * plan.config.tile_m < queries.length:
                self._finish(tensors, softmax_scale, queries, m_block)
        else:
            self._finish(tensors, softmax_scale, queries, m_block)

    @cute.jit
    def _finish(self, tensors: FinishTensors, softmax_scale: Float32, queries: Any, m_block: Any):
        plan = self.plan
        thread = cute.arch.thread_idx()[0]
        block, head, entry = cute.arch.block_idx()
        layout = dq_layout(plan.signature, plan.config)
        pointer = SmemAllocator().allocate_array(
            plan.element, cute.cosize(layout), byte_alignment=1024
        )
        sdQ = swizzled(pointer, layout)[None, None, 0]  # (tile_m, d)
        mma = dq_mma(plan.signature, plan.config)
        acc = cute.make_rmem_tensor(mma.get_slice(thread).partition_shape_C(plan.q_tile), Float32)
        count = dq_registers(plan.signature, plan.config)
        sums = tensors.sums[None, block, head, entry]
        own = dq_of_thread(sums, count, plan, thread)
        flat = cute.make_tensor(acc.iterator, cute.make_layout((4, count // 4)))
        cute.autovec_copy(own, flat)
        acc.store(acc.load() * softmax_scale)
        dq_16 = cute.make_rmem_tensor_like(acc, plan.element)
        convert(acc, dq_16)
        store(mma, dq_16, acc, sdQ, thread)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            dq = queries.tiled(tensors.dq.tensor, head, 0)  # (s_q, d)
            rows = cute.local_tile(dq, plan.q_tile, (None, 0))
            source, target = cpasync.tma_partition(
                tensors.dq.atom,
                0,
                cute.make_layout(1),
                cute.group_modes(sdQ, 0, 2),
                cute.group_modes(rows, 0, 2),
            )
            cute.copy(tensors.dq.atom, source, target[None, m_block])
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
