"""Where warps add their dQ: fp32 sums in global memory, in whatever order or in a fixed one.

As of Hopper (sm90/backward/dq.py), but four bytes at a time, which is what these GPUs add.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...query_blocks import first_tile
from ..copies import address_in


@dataclass(frozen=True)
class DqSums:
    """The sums of one query head, as a thread of a key tile adds to them.

    A block lies as the accumulators hold it: a thread's n-th element is beside those of the others.
    """

    plan: cutlass.Constexpr[Any]
    sums: cute.Pointer  # fp32, of all query heads
    counters: cute.Pointer | None  # Int32, of all query heads, if deterministic
    first_block: Int32  # of the query head
    window: Any
    n_block: Any
    thread: Any

    @cute.jit
    def add(self, parts: tuple, m_block: Int32):
        """This thread's part of a block's dQ."""
        plan = self.plan
        num_threads = plan.config.num_threads
        block_bytes = 4 * plan.config.tile_m * plan.signature.head_dim
        index, offset = self.first_block + m_block, 4 * self.thread
        block = address_in(self.sums.toint(), index, block_bytes, offset)
        values = [part[i] for part in parts for i in range(cute.size(part))]
        for i, value in enumerate(values):
            cute.arch.inline_ptx(
                f"red.relaxed.gpu.global.add.f32 [{{$r0}} + {4 * num_threads * i}], {{$r1}};",
                read_only_args=[block, value],
            )
        if cutlass.const_expr(self.counters is not None):
            self._let_next(m_block)

    @cute.jit
    def wait_for_turn(self, m_block: Int32):
        """Until all tiles with lower keys have added to the block; a barrier has to follow."""
        if cutlass.const_expr(self.counters is not None):
            config = self.plan.config
            first = first_tile(self.window, m_block, tile_m=config.tile_m, tile_n=config.tile_n)
            if self.thread == 0:
                counter = self._counter(m_block)
                while _acquired(counter) < self.n_block - first:
                    pass

    @cute.jit
    def _let_next(self, m_block: Int32):
        # A release is cumulative: one thread's covers what others added ahead of the barrier, as in
        # causality order that comes before it.  So no thread needs a fence of its own.
        cute.arch.sync_threads()
        if self.thread == 0:
            cute.arch.inline_ptx(
                "red.release.gpu.global.add.u32 [{$r0}], 1;",
                read_only_args=[self._counter(m_block)],
            )

    def _counter(self, m_block) -> cute.Pointer:
        return self.counters + self.first_block + m_block


def _acquired(counter: cute.Pointer) -> Int32:
    return cute.arch.inline_ptx(
        "ld.acquire.gpu.global.s32 {$w0}, [{$r0}];",
        write_only_types=[Int32],
        read_only_args=[counter],
    )
