"""Two warps that share query rows: each makes S of half a block's keys, and O of half the columns.

So O of 32 rows fits a warp's registers where it is wide, and K and V are read from shared memory
once for all of them.  What the other warp needs goes through shared memory: P, which as an operand
lies in the same registers of the same lane of both; whether a row's maximum has to move; and,
rarely, that maximum.

A step: any() .. give(), take().  Both warps meet between what one writes and the other reads, and
again before it is written anew: P at the next any(), the note of any() at take().
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

FIRST_BARRIER = 1  # of the hardware's, of the first pair; 0 is __syncthreads
CHUNK = 4  # words that a thread writes at once


@dataclass(frozen=True)
class Pair:
    """One of the two warps, as one thread sees them."""

    space: cute.Pointer  # to Int32: (chunk, thread, CHUNK) of P, and behind them the notes
    num_threads: cutlass.Constexpr[int]
    num_chunks: cutlass.Constexpr[int]  # of a thread's P
    number: Any  # of the pair in its CTA
    thread: Any

    @staticmethod
    def of(plan, space: cute.Pointer, lane, warp) -> "Pair":
        config = plan.config
        words = config.rows_per_warp * plan.keys_per_warp // 64
        return Pair(space, config.num_threads, words // CHUNK, warp // 2, 32 * warp + lane)

    def any(self, flag: Boolean) -> Boolean:
        """Whether the flag of either warp is set."""
        self._note(self.thread, Int32)[0] = Int32(flag)
        self.meet()
        return cute.arch.vote_any_sync(flag | (self._note(self.thread ^ 32, Int32)[0] != 0))

    def largest(self, x: Float32) -> Float32:
        """Of both threads' x."""
        return cute.arch.fmax(x, self._swap(x))

    def sum(self, x: Float32) -> Float32:
        return x + self._swap(x)

    def _swap(self, x: Float32) -> Float32:
        self.meet()
        self._note(self.thread, Float32)[0] = x
        self.meet()
        return self._note(self.thread ^ 32, Float32)[0]

    def give(self, parts: tuple):
        """parts: each row group's P, ((2, 2, 2), 1, keys / 16), which the other one takes."""
        for i, chunk in enumerate(self._chunks(parts)):
            cute.autovec_copy(chunk, self._chunk(i, self.thread))

    def take(self, parts: tuple):
        """What the other one gave."""
        self.meet()
        for i, chunk in enumerate(self._chunks(parts)):
            cute.autovec_copy(self._chunk(i, self.thread ^ 32), chunk)

    def meet(self):
        """What each warp wrote before, both see after."""
        cute.arch.barrier(barrier_id=FIRST_BARRIER + self.number, number_of_threads=64)

    def _chunks(self, parts: tuple) -> list:
        chunks = []
        for part in parts:
            words = cute.recast_tensor(part, Int32)
            for i in range(0, cute.size(words), CHUNK):
                chunks.append(cute.make_tensor(words.iterator + i, cute.make_layout(CHUNK)))
        return chunks

    def _chunk(self, i: int, thread) -> cute.Tensor:
        at = self.space + (i * self.num_threads + thread) * CHUNK
        return cute.make_tensor(at.align(16), cute.make_layout(CHUNK))

    def _note(self, thread, kind: type) -> cute.Tensor:
        at = self.space + self.num_chunks * CHUNK * self.num_threads + thread
        return cute.make_tensor(cute.recast_ptr(at, dtype=kind), cute.make_layout(1))
