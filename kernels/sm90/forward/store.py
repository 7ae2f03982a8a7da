"""Epilogue of the forward kernel: O by TMA or from registers, LSE from registers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.tensor_utils import LayoutEnum

from ...barriers import WARPGROUP, NamedBarriers
from ...scheduler import WorkTile
from ...sequence import Sequence
from ...softmax import Totals
from ...tensors import FwdTensors
from ...views import column_of, convert, rows_and_columns
from ..rings import FwdRings, swizzled


@dataclass(frozen=True)
class LastSlots:
    """The slots of the last K block and the last V block of a tile."""

    k: Any
    v: Any


@dataclass(frozen=True)
class Place:
    """Where a consumer thread's results belong."""

    tile: WorkTile
    sequence: Sequence
    thread: Any  # of the consumers
    first_row: Any  # query of the warpgroup's first row
    row: Any  # of the thread's first row; the second one is 8 below


@dataclass(frozen=True)
class OutputSpace:
    """Where the O of a consumer warpgroup waits for TMA, and whom that keeps waiting.

    config.OSpace tells the kinds; the other roles only call the methods.
    """

    plan: Any
    pointer: cute.Pointer  # start of the space; for "k" and "kv" of the K ring, V's follows it
    layout: Any  # (64, dv, num_mma_warpgroups), composed with its swizzle
    warpgroup: Any
    is_storing_warp: Any  # warp-uniform: the first warp of the warpgroup

    @property
    def kind(self) -> str:
        return self.plan.o_space

    @property
    def barriers(self) -> NamedBarriers:
        return NamedBarriers(self.plan.num_mma_warpgroups)

    @cute.jit
    def scores_done(self, query: Any, turn: Any):
        """This warpgroup has finished the last Q K^T of its turn-th tile."""
        if cutlass.const_expr(self.kind != "q"):
            query.release()
        if cutlass.const_expr(self.kind != "own"):
            for other in cutlass.range_constexpr(self.plan.num_mma_warpgroups):
                # "kv": the second warpgroup writes where V was, output_done() lets it
                if cutlass.const_expr(self.kind != "kv" or other == 0):
                    self._let(other, turn)

    @cute.jit
    def output_done(self, turn: Any):
        """This warpgroup has finished the last O += P V of its turn-th tile."""
        if cutlass.const_expr(self.kind == "kv"):
            self._let(1, turn)

    @cute.jit
    def _let(self, other: cutlass.Constexpr, turn: Any):
        if other != self.warpgroup:
            cute.arch.barrier_arrive(
                barrier_id=self.barriers.o_may_be_written(other, turn),
                number_of_threads=WARPGROUP * self.plan.num_mma_warpgroups,
            )

    @cute.jit
    def wait_until_free(self, turn: Any):
        """Before this warpgroup writes the O of its turn-th tile."""
        if cutlass.const_expr(self.kind == "own"):
            self._wait_for_store()
            cute.arch.barrier(
                barrier_id=self.barriers.o_left(self.warpgroup), number_of_threads=WARPGROUP
            )
        else:
            cute.arch.barrier(
                barrier_id=self.barriers.o_may_be_written(self.warpgroup, turn),
                number_of_threads=WARPGROUP * self.plan.num_mma_warpgroups,
            )

    @cute.jit
    def stored(self, query: Any):
        """The TMA store of O has been issued."""
        if cutlass.const_expr(self.kind == "q"):
            self._wait_for_store(before_release=True)
            query.release()

    @cute.jit
    def give_back(self, rings: FwdRings, last: LastSlots, turn: Any):
        """Release the slots that held the O of the tile before; called beside a product."""
        if cutlass.const_expr(self.plan.keeps_last_k):
            if turn > 0:
                self._wait_for_store(before_release=True)
                rings.k.release(last.k)
                if cutlass.const_expr(self.plan.keeps_last_v):
                    rings.v.release(last.v)

    @cute.jit
    def drain(self):
        """Before the CTA ends: shared memory must outlive the stores that read it."""
        if cutlass.const_expr(self.kind != "q"):
            self._wait_for_store()

    def rows(self, last: LastSlots) -> cute.Tensor:
        """This warpgroup's (64, dv) part of the space."""
        config, (_, _, k_stage, v_stage) = self.plan.config, self.plan.elements
        part, offset = self.warpgroup, 0
        if self.kind == "k":
            offset = last.k * k_stage
        if self.kind == "kv":  # the first warpgroup in K's slot, the second in V's
            in_k, in_v = last.k * k_stage, config.num_stages * k_stage + last.v * v_stage
            part, offset = 0, in_k + self.warpgroup * (in_v - in_k)
        return swizzled(self.pointer + offset, self.layout)[None, None, part]

    @cute.jit
    def store(self, tensors: FwdTensors, frag: Any, totals: Totals, place: Place, last: LastSlots):
        """A warpgroup's 64 rows of O: registers -> stmatrix -> shared memory -> TMA.

        TMA drops the rows beyond s_q and the columns beyond the true head dim.
        """
        plan, tile = self.plan, place.tile
        sO = self.rows(last)  # (64, dv)
        acc_16 = cute.make_rmem_tensor_like(frag.acc_O, plan.element)
        convert(frag.acc_O, acc_16)
        atom = hopper.get_smem_store_op(LayoutEnum.ROW_MAJOR, plan.element, Float32)
        copy = cute.make_tiled_copy_C(atom, frag.mma.pv).get_slice(place.thread % WARPGROUP)
        self.wait_until_free(tile.turn)
        cute.copy(copy, copy.retile(acc_16), copy.partition_D(sO))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(
            barrier_id=self.barriers.o_written(self.warpgroup), number_of_threads=WARPGROUP
        )
        if self.is_storing_warp:
            o = place.sequence.queries.tiled(tensors.o.tensor, tile.head, 0)  # (s_q, dv)
            rows = cute.local_tile(o, plan.o_tile, (None, 0))  # (64, dv, num_64_row_blocks)
            from_smem, to_rows = cpasync.tma_partition(
                tensors.o.atom,
                0,
                cute.make_layout(1),
                cute.group_modes(sO, 0, 2),
                cute.group_modes(rows, 0, 2),
            )
            block = tile.m_block * plan.num_mma_warpgroups + self.warpgroup
            cute.copy(tensors.o.atom, from_smem, to_rows[None, block])
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def _wait_for_store(self, before_release: cutlass.Constexpr = False):
        if self.is_storing_warp:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            if cutlass.const_expr(before_release):
                cute.arch.sync_warp()  # a lane knows of its own store, and one releases for all


@dataclass(frozen=True)
class RegistersToGlobal:
    """O waits nowhere: the tile's Q is free after its last product, and nothing is given back."""

    write: Callable  # (tensors, frag, totals, place): a warpgroup's 64 rows of O

    def scores_done(self, query: Any, turn: Any):
        query.release()

    def output_done(self, turn: Any):
        pass

    def give_back(self, rings: FwdRings, last: LastSlots, turn: Any):
        pass

    def stored(self, query: Any):
        pass

    def drain(self):
        pass

    def store(self, tensors: FwdTensors, frag: Any, totals: Totals, place: Place, last: LastSlots):
        self.write(tensors, frag, totals, place)


@cute.jit
def write_partial(tensors: FwdTensors, frag: Any, totals: Totals, place: Place):
    """fp32 as it is. A quad writes 8 neighbouring columns of a row: 32 bytes, a whole sector."""
    queries, lane = place.sequence.queries, place.thread % 32
    mO = queries.matrix(tensors.o, place.tile.head)  # (s_q, dv)
    values = rows_and_columns(frag.acc_O)  # (2, (2, dv / 8))
    for i in cutlass.range_constexpr(0, cute.size(values, mode=[1]), 2):
        column = column_of(i) + 2 * (lane % 4)
        if column < mO.shape[1]:
            for r in cutlass.range_constexpr(2):
                row = place.row + 8 * r
                pair = cute.make_rmem_tensor(2, Float32)
                pair[0], pair[1] = values[r, i], values[r, i + 1]
                if row < queries.length:
                    target = cute.local_tile(mO, (1, 2), (row, column // 2))
                    cute.autovec_copy(pair, cute.make_tensor(target.iterator, cute.make_layout(2)))
