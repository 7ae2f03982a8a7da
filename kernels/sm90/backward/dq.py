"""Where consumers add their dQ: fp32 sums in global memory, in whatever order or in a fixed one.

In a fixed order (BwdSignature.deterministic) the tiles of a head add to a block of queries by
ascending keys.  A counter per block and warpgroup says how many have: a warpgroup waits for those
before it, adds, and lets the next one.  The schedule deals a head's tiles by ascending keys, too:
the first tile that is not done waits for none.  All tiles begin with their last block, so that they
follow each other at a distance of one step.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...barriers import WARPGROUP
from ...query_blocks import first_tile


def dq_registers(signature, config) -> int:
    """fp32 of a tile of dQ that each consumer thread holds."""
    return config.tile_m * signature.head_dim // (WARPGROUP * config.num_mma_warpgroups)


def dq_of_thread(sums: cute.Tensor, count: int, num_threads: int, thread) -> cute.Tensor:
    """(tile_m * tile_d,), a block of BwdArguments.dq_sums -> (4, count / 4) of a thread.

    The block lies as the accumulators hold it: a thread has 16 bytes beside those of the next one.
    """
    shape, stride = (4, count // 4), (1, 4 * num_threads)
    return cute.make_tensor(sums.iterator + 4 * thread, cute.make_layout(shape, stride=stride))


@dataclass(frozen=True)
class DqSums:
    """The sums of one query head, as a thread of a key tile adds to them."""

    plan: cutlass.Constexpr[Any]
    sums: cute.Tensor  # (tile_m * tile_d, m_blocks) fp32
    counters: cute.Tensor | None  # (num_mma_warpgroups, m_blocks) Int32, if deterministic
    window: Any
    n_block: Any
    thread: Any  # of the consumers

    @cute.jit
    def add(self, acc_dQ: cute.Tensor, m_block: Int32):
        """This thread's part of a block's dQ, four fp32 per instruction."""
        if cutlass.const_expr(self.counters is not None):
            self._wait(m_block)
        count = cute.size(acc_dQ)
        sums = self.sums[None, m_block]
        own = dq_of_thread(sums, count, self.plan.num_consumers, self.thread)  # (4, count / 4)
        for i in cutlass.range_constexpr(count // 4):
            cute.arch.inline_ptx(
                "red.relaxed.gpu.global.add.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[own[None, i].iterator, *(acc_dQ[4 * i + j] for j in range(4))],
            )
        if cutlass.const_expr(self.counters is not None):
            self._let_next(m_block)

    @cute.jit
    def _wait(self, m_block: Int32):
        """Until all tiles with lower keys that visit the block have added to it."""
        config = self.plan.config
        first = first_tile(self.window, m_block, tile_m=config.tile_m, tile_n=config.tile_n)
        if self.thread % WARPGROUP == 0:
            counter = self._counter(m_block)
            while _acquired(counter) < self.n_block - first:
                pass
        self._sync()

    @cute.jit
    def _let_next(self, m_block: Int32):
        cute.arch.fence_acq_rel_gpu()
        self._sync()
        if self.thread % WARPGROUP == 0:
            cute.arch.inline_ptx(
                "red.release.gpu.global.add.u32 [{$r0}], 1;",
                read_only_args=[self._counter(m_block)],
            )

    def _counter(self, m_block) -> cute.Pointer:
        return (
            self.counters[self.thread // WARPGROUP, None].iterator
            + m_block * (self.counters.stride[1])
        )

    def _sync(self):
        self.plan.barriers.dq_in_order(self.thread // WARPGROUP)


def _acquired(counter: cute.Pointer) -> Int32:
    return cute.arch.inline_ptx(
        "ld.acquire.gpu.global.s32 {$w0}, [{$r0}];",
        write_only_types=[Int32],
        read_only_args=[counter],
    )
