"""Where consumers add their dQ: fp32 sums in global memory, in whatever order or in a fixed one.

It leaves in the order in which the accumulators hold it, and `finish` reads it so.  With
BwdConfig.dq_in_bulk each warp writes its part to shared memory, and one lane has it added in bulk
while the warp goes on; no warp waits for another.  Otherwise threads add from registers, and stand
until L2 has room.

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
from cutlass import Float32, Int32, Int64

from ...barriers import WARPGROUP
from ...query_blocks import first_tile

WARP = 32  # threads


def dq_registers(signature, config) -> int:
    """fp32 of a tile of dQ that each consumer thread makes."""
    return config.tile_m * signature.head_dim // (WARPGROUP * config.num_mma_warpgroups)


def dq_buffer(plan, allocator) -> cute.Tensor | None:
    """Shared memory for dQ on its way out, if it leaves in bulk: of `dq_room` copies."""
    if not (plan.signature.with_dq and plan.config.dq_in_bulk):
        return None
    config = plan.config
    tile = config.tile_m * plan.signature.head_dim
    layout = cute.make_layout((tile // config.dq_copies, config.dq_room))
    pointer = allocator.allocate_array(Float32, cute.size(layout), byte_alignment=128)
    return cute.make_tensor(pointer, layout)


def dq_of_thread(block: cute.Tensor, count: int, plan, thread) -> cute.Tensor:
    """(tile_m * tile_d,), a block of BwdArguments.dq_sums -> (4, count / 4) of a thread.

    The block lies as the accumulators hold it, a thread's 16 bytes beside those of the next one: of
    each warp in a part of its own, if it leaves in bulk, else of all consumers.
    """
    own, beside = 4 * thread, plan.num_consumers
    if plan.config.dq_in_bulk:
        own, beside = thread // WARP * (WARP * count) + 4 * (thread % WARP), WARP
    layout = cute.make_layout((4, count // 4), stride=(1, 4 * beside))
    return cute.make_tensor(block.iterator + own, layout)


@cute.jit
def wait_for_dq(plan: cutlass.Constexpr, buffer: cute.Tensor | None):
    """Before a CTA ends: until all that its threads have sent off from the buffer has arrived.

    In order finish() has waited for it.
    """
    if cutlass.const_expr(buffer is not None and not plan.signature.deterministic):
        cute.arch.cp_async_bulk_wait_group(0)


@dataclass(frozen=True)
class DqSums:
    """The sums of one query head, as a thread of a key tile adds to them."""

    plan: cutlass.Constexpr[Any]
    sums: cute.Tensor  # (tile_m * tile_d, m_blocks) fp32
    counters: cute.Tensor | None  # (num_mma_warpgroups, m_blocks) Int32, if deterministic
    window: Any
    n_block: Any
    m_max: Any  # the tile's first block of queries is the one before it
    thread: Any  # of the consumers
    buffer: cute.Tensor | None  # dq_buffer

    @staticmethod
    def of(work: Any, tile: Any, head, thread, buffer: cute.Tensor | None) -> "DqSums | None":
        """Those of a query head, if dQ is wanted."""
        sums, counters = work.dq_sums(tile, head)
        if sums is None:
            return None
        window, m_max = work.window_of(tile), work.blocks_of(tile).m_max
        return DqSums(work.plan, sums, counters, window, tile.n_block, m_max, thread, buffer)

    @cute.jit
    def add(
        self,
        acc_dQ: cute.Tensor,
        m_block: Int32,
        part: cutlass.Constexpr[int] = 0,
        is_made: Any = True,
    ):
        """This thread's part of a slice of a block's dQ; slices follow each other.

        is_made: whether it is of a block.  A buffer is written all the same, as branches cost more.
        """
        config = self.plan.config
        begins_in_order = self.counters is not None and part == 0
        if cutlass.const_expr(begins_in_order):
            if m_block + 1 < self.m_max:
                self._let_next(m_block + 1)
        if cutlass.const_expr(self.buffer is None):
            if is_made:
                if cutlass.const_expr(begins_in_order):
                    self._wait(m_block)
                self._add_from_registers(acc_dQ, m_block, part)
        else:
            block = self.sums[None, m_block].iterator
            first = self._warp * (WARP * cute.size(acc_dQ) * config.dq_slices)
            own = (block + first).toint()
            if cutlass.const_expr(config.dq_copies > 1):
                own = _kept(own)
            copies = config.dq_copies // config.dq_slices
            count = cute.size(acc_dQ) // copies
            for i in cutlass.range_constexpr(copies):
                number = part * copies + i
                self._to_buffer(acc_dQ.iterator + i * count, count, number)
                if is_made:
                    if cutlass.const_expr(begins_in_order and i == 0):
                        self._wait(m_block)
                    self._add_in_bulk(own + 4 * number * (WARP * count), count, number)

    @cute.jit
    def finish(self, m_min: Int32):
        """Behind the last block of a query head: the tile's last one."""
        if cutlass.const_expr(self.counters is not None):
            if m_min < self.m_max:
                self._let_next(m_min)

    @cute.jit
    def _to_buffer(
        self,
        acc: cute.Pointer,
        count: cutlass.Constexpr[int],
        number: cutlass.Constexpr[int],
    ):
        """Registers of the step's copy `number`."""
        config = self.plan.config
        if cutlass.const_expr(_must_wait(number, config, self.counters is not None)):
            sent_since = number - 1 - _before(number, config)
            cute.arch.cp_async_bulk_wait_group(sent_since, read=True)
            cute.arch.sync_warp()  # one lane knows of the copies before
        source = cute.make_tensor(acc, cute.make_layout((4, count // 4)))
        cute.autovec_copy(source, self._own(self._room(number), count))
        cute.arch.fence_view_async_shared()
        if cutlass.const_expr(self.counters is None or number > 0):
            cute.arch.sync_warp()  # in order the whole warpgroup meets in _wait()

    def _room(self, number: int) -> cute.Tensor:
        return self.buffer[None, number % self.plan.config.dq_room]

    @cute.jit
    def _add_in_bulk(
        self,
        target: Int64,
        count: cutlass.Constexpr[int],
        number: cutlass.Constexpr[int],
    ):
        """The warp's part of the buffer."""
        source = self._room(number).iterator + self._warp * (WARP * count)
        with cute.arch.elect_one():
            cute.arch.inline_ptx(
                "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{$r0}], [{$r1}], "
                f"{4 * WARP * count};",
                read_only_args=[target, source],
            )
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def _add_from_registers(self, acc_dQ: cute.Tensor, m_block: Int32, part: int):
        """Four fp32 per instruction."""
        quads = cute.size(acc_dQ) // 4
        own = self._own(self.sums[None, m_block], 4 * quads * self.plan.config.dq_slices)
        for i in cutlass.range_constexpr(quads):
            four = (acc_dQ[4 * i + j] for j in range(4))
            cute.arch.inline_ptx(
                "red.relaxed.gpu.global.add.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[own[None, part * quads + i].iterator, *four],
            )

    @property
    def _warp(self):
        return cute.arch.make_warp_uniform(self.thread // WARP)

    def _own(self, block: cute.Tensor, count: int) -> cute.Tensor:
        return dq_of_thread(block, count, self.plan, self.thread)

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
        if cutlass.const_expr(self.buffer is not None):
            cute.arch.fence_proxy("async.global")

    @cute.jit
    def _let_next(self, m_block: Int32):
        """A step after the block was added, when that has arrived without waiting for it."""
        if cutlass.const_expr(self.buffer is not None):
            cute.arch.cp_async_bulk_wait_group(0)
        # A release is cumulative: one thread's covers what others added ahead of the barrier, as in
        # causality order that comes before it.  So no thread needs a fence of its own.
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


def _kept(address: Int64) -> Int64:
    """The address, which ptxas would compute again for every copy, on the way of the one lane."""
    return cute.arch.inline_ptx(
        "mov.b64 {$w0}, {$r0};", write_only_types=[Int64], read_only_args=[address]
    )


def _before(number: int, config) -> int:
    """The copy whose room a step's copy `number` takes; those of the step before end with -1."""
    copies, room = config.dq_copies, config.dq_room
    return max(i for i in range(-copies, number) if i % copies % room == number % room)


def _must_wait(number: int, config, in_order: bool) -> bool:
    """Whether a warp does not know yet that the copy before has left its room.

    It does if it has waited for a later one in this step; in order, _let_next() for all before it.
    """
    before = _before(number, config)
    waited_for = [_before(i, config) for i in range(number)] + [-1] * in_order
    return all(before > i for i in waited_for)


def _acquired(counter: cute.Pointer) -> Int32:
    return cute.arch.inline_ptx(
        "ld.acquire.gpu.global.s32 {$w0}, [{$r0}];",
        write_only_types=[Int32],
        read_only_args=[counter],
    )
