"""Backward pass for Ampere and Ada: three kernels, and the second one's shared memory and sides.

    prepare    simple/bwd_prepare.py     delta = rowsum(dO * O) - dlse, lse in base 2, dQ's sums = 0
    backward   here                      dK and dV of a tile of keys, dQ added to its sums
    finish     finish.py                 dQ from fp32 to 16 bits

P is computed again from Q, K and lse.  A CTA has a tile of tile_n keys of one key head, and visits
all blocks of tile_m queries that see them, of every query head that reads the key head.  Two sides
of four warps share the work:

    side 0   copies K, Q, lse     S^T = K Q^T  | P^T = exp2(..)  | dV += P^T dO     | dQ = dS K
    side 1   copies V, dO, delta  dP^T = V dO^T     | dS^T of P, dP    | dK += dS^T Q | dQ = dS K
                                                 ^ P                               ^ dS

Each makes the scores that it uses, so that a warp has room for the sums of 32 or 48 keys, and reads
Q and dO from shared memory that often less.  P goes from a warp to the one of the other side with
the same keys, in 16 bits through shared memory; dS, for dQ, to all.  dQ is made of both sides'
warps, and leaves for its sums in L2 as the accumulators hold it.

Registers of a thread at head dim 128: sums 128, scores 64.  From 192 on two warps of a side share
48 or 32 keys, each with half of the queries and half of the channels.

Sources: FlashAttention-2 (arXiv 2307.08691), section 3.1.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.memory import SmemAllocator

from ...bwd_arguments import BwdArguments
from ...bwd_example import backward_example
from ...bwd_signature import BwdSignature
from ...bwd_work import BwdScalars, BwdWork, KeyTile
from ...key_mask import KeyMask
from ...scheduler import Schedule, TileList, TileOrder
from ...scores import KeyScores
from ...simple.bwd_clear import Clear, Gradients
from ...simple.bwd_prepare import Prepare, PrepareTensors
from ...tensors import permute
from ..bwd_config import SIDE_WARPS, Sm80BwdConfig
from ..copies import RowCopy, commit, kept, wait_for_all
from ..mma import Lanes, SharedResult, first_chunk_of
from .differentiate import differentiate
from .dq import DqSums
from .finish import Finish
from .load import Loads, StatsCopy
from .plan import BwdPlan
from .products import Side
from .store import store_rows, write

SIDE = 32 * SIDE_WARPS  # threads


@dataclass(frozen=True)
class BwdTensors:
    """Global tensors with the tiled modes first; heads of k and v are fewer under GQA."""

    q: cute.Tensor  # (s_q, d, h_q, b)
    k: cute.Tensor  # (s_k, d, h_k, b)
    v: cute.Tensor  # (s_k, dv, h_k, b)
    do: cute.Tensor  # (s_q, dv, h_q, b)
    dk: cute.Tensor | None  # (s_k, d, h_k, b)
    dv: cute.Tensor | None  # (s_k, dv, h_k, b)
    row_stats: cute.Tensor  # (2 * tile_m, m_blocks, h_q, b) fp32
    dq_sums: cute.Tensor | None  # (tile_m * tile_d, m_blocks, h_q, b) fp32, if dQ is wanted
    dq_counters: cute.Tensor | None  # (1, m_blocks, h_q, b) Int32
    lengths: Any  # lengths.GivenLengths, of ragged sequences

    delta_parts = None  # for what asks either architecture's

    def first_block(self, queries: Any, head, tile_m: int):
        """Of a query head of a sequence, in the workspace."""
        _, m_blocks, heads, _ = self.row_stats.shape
        return (queries.entry * heads + head) * m_blocks + queries.first_block(tile_m)


@dataclass(frozen=True)
class Space:
    """Shared memory of a CTA."""

    k: cute.Pointer  # and dK
    v: cute.Pointer  # and dV
    q: cute.Pointer
    do: cute.Pointer
    p: cute.Pointer
    ds: cute.Pointer  # that of P, where a warp reads P that overwrites it
    stats: tuple[cute.Pointer, cute.Pointer]  # (tile_m, num_stages) fp32: lse, delta

    @staticmethod
    def of(plan: BwdPlan) -> "Space":
        def space(num_elements, element=plan.element):
            return allocator.allocate_array(element, num_elements, byte_alignment=1024)

        allocator, config = SmemAllocator(), plan.config
        stages = config.num_stages
        k = space(plan.k.elements)
        rows = stages * (plan.q.elements + plan.do.elements)
        # What V has in registers only is loaded to where Q and dO will be.
        lost = config.tile_n * config.v_columns_lost
        q = space(rows + plan.v.elements - lost)
        p = space(plan.p.elements)
        stats = tuple(space(stages * config.tile_m, Float32) for _ in range(2))
        return Space(
            k=k,
            v=q + (rows - lost),
            q=q,
            do=q + stages * plan.q.elements,
            p=p,
            ds=p if config.column_warps == 1 else space(plan.p.elements),
            stats=stats,
        )


class BackwardSm80:
    """The backward pass of one BwdSignature, laid out by one Sm80BwdConfig."""

    def __init__(self, signature: BwdSignature, config: Sm80BwdConfig):
        config.check(signature)
        self.plan = BwdPlan(signature, config)

    def example_args(self) -> tuple:
        """Symbolic arguments of __call__ for cute.compile."""
        return backward_example(self.plan)

    @cute.jit
    def __call__(self, arguments: BwdArguments, stream):
        plan, x = self.plan, arguments
        q, k, v = (permute(t, [1, 3, 2, 0]) for t in (x.q, x.k, x.v))
        dq, dk, dv = (None if t is None else permute(t, [1, 3, 2, 0]) for t in (x.dq, x.dk, x.dv))
        given, lengths = PrepareTensors.of(x), plan.lengths.given(x)
        sequences = plan.lengths.sequences(q.shape[0], k.shape[0], lengths)
        Prepare(plan.config.tile_m, plan.signature.head_dim_v)(given, sequences, stream)
        workspace = given.row_stats, given.dq_sums, given.dq_counters
        tensors = BwdTensors(q, k, v, given.dout, dk, dv, *workspace, lengths)
        order = plan.lengths.order(x, stream)
        self.kernel(tensors, BwdScalars.of(x), order).launch(
            grid=(cutlass.min(x.num_ctas, order.count), 1, 1),
            block=(plan.config.num_threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,  # percent; else the DSL asks the driver for the sizes
        )
        if cutlass.const_expr(plan.signature.with_dq):
            Finish(plan)(given.dq_sums, dq, sequences, x.softmax_scale, stream)
        if cutlass.const_expr(plan.signature.is_ragged):
            Clear()(Gradients(dq, dk, dv), sequences, stream)

    @cute.kernel
    def kernel(self, tensors: BwdTensors, scalars: BwdScalars, order: TileOrder | TileList):
        space = Space.of(self.plan)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) < SIDE_WARPS:
            self._side(tensors, scalars, order, space, True)
        else:
            self._side(tensors, scalars, order, space, False)

    @cute.jit
    def _side(
        self,
        tensors: BwdTensors,
        scalars: BwdScalars,
        order: TileOrder | TileList,
        space: Space,
        makes_p: cutlass.Constexpr[bool],
    ):
        """All tiles of this CTA, as one side works on them."""
        side = Side.of(self.plan, makes_p, *_warp_and_lane(), space)
        turn = Int32(0)
        is_valid = self._work(tensors, scalars, order).at(turn).is_valid
        while is_valid:
            # Which tile it is is looked up again and again: kept meanwhile, it would spill.
            self._start(tensors, scalars, order, turn, space, side)
            heads_per_group = tensors.q.shape[2] // tensors.k.shape[2]
            for i in cutlass.range(heads_per_group, unroll=1):
                self._head(tensors, scalars, order, turn, i, space, side)
            self._store(tensors, scalars, order, turn, space, side)
            turn += 1
            is_valid = self._work(tensors, scalars, order).at(turn).is_valid

    @cute.jit
    def _start(
        self,
        tensors: BwdTensors,
        scalars: BwdScalars,
        order: TileOrder | TileList,
        turn: Int32,
        space: Space,
        side: Side,
    ):
        """K or V of a tile."""
        plan, work, thread = self.plan, self._work(tensors, scalars, order), _thread()
        tile = work.at(turn)
        keys = work.sequence_of(tile).keys
        layout, tensor, pointer = (
            (plan.k, tensors.k, space.k) if side.makes_p else (plan.v, tensors.v, space.v)
        )
        matrix = keys.matrix(tensor, tile.head_kv)
        copy = _copy(layout, thread, matrix, keys.length, pointer)
        copy.issue(tile.n_block, 0, is_partial=True)
        commit()
        side.start()
        if cutlass.const_expr(max(plan.config.k_in_registers, plan.config.v_in_registers) > 0):
            wait_for_all()
            side.keep()
            if cutlass.const_expr(not plan.config.v_is_kept):
                cute.arch.sync_threads()

    @cute.jit
    def _head(
        self,
        tensors: BwdTensors,
        scalars: BwdScalars,
        order: TileOrder | TileList,
        turn: Int32,
        index: Int32,
        space: Space,
        side: Side,
    ):
        """What the index-th query head of the group adds to dV or dK, and its part of dQ."""
        plan, work = self.plan, self._work(tensors, scalars, order)
        warp, lane = _warp_and_lane()
        tile = work.at(kept(turn))
        blocks = work.blocks_of(tile)
        head = tile.head_kv * work.heads_per_group + index
        loads = self._loads(tensors, work, tile, head, blocks, space, side.makes_p)
        if blocks.count > 0:
            loads.start(blocks.m_max - 1)
        scores = KeyScores.of(plan, scalars, self._mask(work, tile, warp, lane))
        sums = self._dq_sums(tensors, work, tile, head)
        stats, (at, _) = space.stats[0 if side.makes_p else 1], plan.config.split(warp)
        differentiate(side, loads, stats, blocks, scores, sums, at)

    def _work(self, tensors: BwdTensors, scalars: BwdScalars, order) -> BwdWork:
        cta, num_ctas = kept(cute.arch.block_idx()[0]), kept(cute.arch.grid_dim()[0])
        if self.plan.signature.mask == "causal" and isinstance(order, TileOrder):
            # A round's number of tiles, and how many rounds there are, would be kept, and spill.
            order = replace(order, heads_per_group=kept(order.heads_per_group))
        schedule = Schedule.of(order, cta, num_ctas)
        return BwdWork.of(self.plan, tensors, tensors.q, tensors.k, scalars, schedule)

    def _mask(self, work: BwdWork, tile: KeyTile, warp, lane) -> KeyMask:
        """Where the thread's scores lie in a tile, of the warp's first group of keys."""
        config = self.plan.config
        at_keys, part = config.split(warp)
        row = tile.n_block * config.tile_n + at_keys * config.keys_per_warp + lane // 4
        column = part * config.score_columns + 2 * (lane % 4)
        return KeyMask(work.window_of(tile), config.tile_m, row, column)

    def _loads(
        self, tensors: BwdTensors, work: BwdWork, tile: KeyTile, head, blocks, space, makes_p: bool
    ) -> Loads:
        plan, thread = self.plan, _thread()
        queries = work.sequence_of(tile).queries
        layout, tensor, pointer = (
            (plan.q, tensors.q, space.q) if makes_p else (plan.do, tensors.do, space.do)
        )
        numbers = 0 if makes_p else 1
        stats = tensors.row_stats.iterator + numbers * plan.config.tile_m
        first_block = tensors.first_block(queries, head, plan.config.tile_m)
        matrix = queries.matrix(tensor, head)
        return Loads(
            plan.config.num_stages,
            _copy(layout, thread, matrix, queries.length, pointer),
            StatsCopy.of(plan.config.tile_m, stats, first_block, space.stats[numbers], thread),
            blocks.m_min,
        )

    def _dq_sums(self, tensors: BwdTensors, work: BwdWork, tile: KeyTile, head) -> DqSums | None:
        if tensors.dq_sums is None:
            return None
        counters, queries = tensors.dq_counters, work.sequence_of(tile).queries
        return DqSums(
            self.plan,
            tensors.dq_sums.iterator,
            None if counters is None else counters.iterator,
            tensors.first_block(queries, head, self.plan.config.tile_m),
            work.window_of(tile),
            tile.n_block,
            cute.arch.thread_idx()[0],
        )

    @cute.jit
    def _store(
        self,
        tensors: BwdTensors,
        scalars: BwdScalars,
        order: TileOrder | TileList,
        turn: Int32,
        space: Space,
        side: Side,
    ):
        """dV or dK, through the space of V or K."""
        plan, config = self.plan, self.plan.config
        warp, lane = _warp_and_lane()
        layout, tensor, pointer, scale = (
            (plan.v, tensors.dv, space.v, None)
            if side.makes_p
            else (plan.k, tensors.dk, space.k, scalars.softmax_scale)
        )
        at_keys, part = config.split(warp)
        lanes = Lanes.of(layout.columns, lane).result
        lanes ^= first_chunk_of(layout, config.column_warps, part)
        result = SharedResult.beside(layout, pointer, lanes, at_keys * config.keys_per_warp)
        wait_for_all()  # no warp reads shared memory any more
        if cutlass.const_expr(not plan.signature.with_dkv):
            return
        sums = tuple(group.sums for group in side.groups)
        write(sums, result, side.columns, plan.element, scale)
        cute.arch.sync_threads()
        work = self._work(tensors, scalars, order)
        tile = work.at(turn)
        keys = work.sequence_of(tile).keys
        matrix = keys.matrix(tensor, tile.head_kv)
        first = tile.n_block * config.tile_n
        store_rows(matrix, layout, pointer, first, keys.length, _thread(), SIDE)
        cute.arch.sync_threads()  # no warp reads dK or dV any more


def _copy(layout, thread, matrix, length, pointer) -> RowCopy:
    """By one side's threads. A row of the tables may serve head dims far below its tile's."""
    offset = RowCopy.thread_offset(layout, thread)
    return RowCopy.of(layout, SIDE, thread, matrix, length, pointer, offset, layout.blocks)


def _thread():
    """Of the side; worked out anew wherever it is asked for."""
    return kept(cute.arch.thread_idx()[0]) % SIDE


def _warp_and_lane() -> tuple:
    """Of the side."""
    thread = _thread()
    return cute.arch.make_warp_uniform(thread // 32), thread % 32
