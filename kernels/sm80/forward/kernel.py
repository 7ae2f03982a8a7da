"""FlashAttention-2 forward for Ampere and Ada: host side, shared memory, the tiles of a CTA.

All warps of a CTA do the same, each for 16 or 32 query rows of its own; only K and V are shared,
and nothing of S, P or O leaves a warp's registers, unless two warps share their rows (pair.py).
With one stage (load.py), per step:

    all         | barrier |           | barrier |                            | barrier
    copies      |         | V_n       |         | K_(n-1)                    |
    warp        |         | S = Q K_n |         | y, exp2 .. P | O += P V_n  |
    other warps |         | the same, at their own pace: the scheduler gives tensor cores and
                            exponentials to whoever is ready; a second CTA fills the barriers

Registers of a thread, rows_per_warp = 32: O dv, S tile_n, P tile_n / 2 (its S is free by then),
a step's fragments of Q and K or V about 40; half of O, S and P for 16 rows, and half as many as the
columns of Q that stay.  A warp of a pair has half of O's columns and of S's.

Shared memory over tensor cycles on sm_80 is 16 / rows_per_warp, plus Q where it does not stay in
registers, plus the copies, plus P between warps of a pair.

Sources: FlashAttention-2 (arXiv 2307.08691).
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.memory import SmemAllocator

from ...arguments import FwdArguments
from ...elements import ELEMENT, Elements
from ...example import forward_example, no_scales
from ...headroom import HEADROOM_LOG2, LIMIT_LOG2
from ...lengths import EqualLengths, RaggedLengths
from ...mask import Mask
from ...scheduler import Schedule, TileList, TileOrder, WorkTile
from ...scores import Scores, SoftmaxScale
from ...sequence import Sequence
from ...signature import Signature
from ...softmax import OnlineSoftmax, Totals
from ...tensors import FwdScalars, FwdTensors, permute
from ...tiling import QueryTiles
from ...work import Work
from ..config import Sm80Config
from ..copies import RowCopy, TileLayout, kept
from ..mma import ROWS
from .attend import Rows, attend
from .load import Loads
from .products import Products
from .store import Place, store_output


@dataclass(frozen=True)
class FwdPlan:
    """The compile-time numbers of a kernel."""

    signature: Signature
    config: Sm80Config

    @property
    def element(self) -> type:
        return ELEMENT[self.signature.dtype]

    @property
    def tile_m(self) -> int:
        return self.config.tile_m

    @property
    def tile_n(self) -> int:
        return self.config.tile_n

    @property
    def head_dim(self) -> int:
        return self.signature.head_dim

    @property
    def head_dim_v(self) -> int:
        return self.signature.head_dim_v

    @property
    def q_in_registers(self) -> int:
        """Columns."""
        return min(self.config.q_in_registers, self.head_dim)

    @property
    def keys_per_warp(self) -> int:
        """Of a block."""
        return self.tile_n // self.config.warps_per_row

    @property
    def columns_per_warp(self) -> int:
        """Of O."""
        return self.head_dim_v // self.config.warps_per_row

    @property
    def has_pairs(self) -> bool:
        return self.config.warps_per_row > 1

    @property
    def row_groups(self) -> int:
        """Of a warp."""
        return self.config.rows_per_warp // ROWS

    def first_rows(self, warp) -> tuple:
        """Of the warp's row groups, in the tile."""
        config = self.config
        warps = config.num_warps // config.warps_per_row
        warp = warp // config.warps_per_row
        return tuple(ROWS * (warp + warps * m) for m in range(self.row_groups))

    def part(self, warp):
        """Which part of a block's keys and of O's columns the warp has."""
        return warp % 2 if self.has_pairs else 0

    @property
    def tiling(self) -> QueryTiles:
        sizes = self.tile_m, self.tile_n
        return QueryTiles(self.signature.mask, *sizes, max_ctas=self.config.max_ctas)

    @property
    def lengths(self) -> EqualLengths | RaggedLengths:
        return (RaggedLengths if self.signature.is_ragged else EqualLengths)(self)

    @property
    def q(self) -> TileLayout:
        return TileLayout(self.tile_m, self.head_dim)

    @property
    def k(self) -> TileLayout:
        return TileLayout(self.tile_n, self.head_dim)

    @property
    def v(self) -> TileLayout:
        return TileLayout(self.tile_n, self.head_dim_v)

    @property
    def o(self) -> TileLayout:
        return TileLayout(self.tile_m, self.head_dim_v)

    def softmax(self) -> OnlineSoftmax:
        dtype = self.signature.dtype
        return OnlineSoftmax.of(HEADROOM_LOG2[dtype], LIMIT_LOG2[dtype], 0)


@dataclass(frozen=True)
class Space:
    """Shared memory of a CTA."""

    q: cute.Pointer  # and O
    k: cute.Pointer
    v: cute.Pointer
    pairs: cute.Pointer | None  # what pairs of warps exchange, in Int32

    @staticmethod
    def of(plan: FwdPlan) -> "Space":
        def space(num_elements):
            return allocator.allocate_array(plan.element, num_elements, byte_alignment=1024)

        allocator, stages = SmemAllocator(), plan.config.num_stages
        q = space(max(plan.q.elements, plan.o.elements))
        k, v = space(stages * plan.k.elements), space(stages * plan.v.elements)
        pairs = None
        if plan.has_pairs:
            words = plan.config.pair_bytes // 4
            pairs = allocator.allocate_array(Int32, words, byte_alignment=16)
        return Space(q, k, v, pairs)


class ForwardSm80:
    """The forward kernel of one Signature, laid out by one Sm80Config."""

    def __init__(self, signature: Signature, config: Sm80Config):
        config.check(signature)
        self.plan = FwdPlan(signature, config)

    def example_args(self) -> tuple:
        """Symbolic arguments of __call__ for cute.compile."""
        return forward_example(self.plan, Elements.of(self.plan.signature), no_scales)

    @cute.jit
    def __call__(self, arguments: FwdArguments, stream):
        plan = self.plan
        num_ctas = arguments.num_ctas * plan.config.ctas_per_sm
        x = replace(arguments, num_ctas=num_ctas)
        q, k, v, o = (permute(t, [1, 3, 2, 0]) for t in (x.q, x.k, x.v, x.out))
        tensors = FwdTensors(
            q=q,
            k=k,
            v=v,
            o=o,
            lse=permute(x.lse, [2, 1, 0]),
            sinks=permute(x.sinks, [1, 0]) if plan.signature.sinks else None,
            lengths=plan.lengths.given(x),
        )
        window = x.window_left, x.window_right
        more = {"rows_per_query": x.rows_per_query}
        scalars = FwdScalars(x.scale_log2, x.softcap_log2, *window, **more)
        order = plan.lengths.order(x, stream)
        self.kernel(tensors, scalars, order).launch(
            grid=(cutlass.min(x.num_ctas, order.count), 1, 1),
            block=(plan.config.num_threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=plan.config.ctas_per_sm,
            preferred_smem_carveout=100,  # percent; else the DSL asks the driver for the sizes
        )

    @cute.kernel
    def kernel(self, tensors: FwdTensors, scalars: FwdScalars, order: TileOrder | TileList):
        plan = self.plan
        space = Space.of(plan)
        products = Products.of(plan, *_lane_and_warp(), space)
        softmaxes = tuple(plan.softmax() for _ in range(plan.row_groups))
        tile = self._work(tensors, scalars, order).first()
        while tile.is_valid:
            # Which tile it is is looked up again and again: kept meanwhile, it would spill.
            work = self._work(tensors, scalars, order)
            self._attend(tensors, scalars, work, tile, space, products, softmaxes)
            self._wait_for_space_of_o()
            work = self._work(tensors, scalars, order)
            tile = work.again(tile)
            self._store(tensors, work.sequence_of(tile), tile, space, products, softmaxes)
            cute.arch.sync_threads()  # no warp reads Q, K, V or O any more
            tile = self._work(tensors, scalars, order).next(tile)

    def _work(self, tensors: FwdTensors, scalars: FwdScalars, order) -> Work:
        cta, num_ctas = kept(cute.arch.block_idx()[0]), kept(cute.arch.grid_dim()[0])
        q_rows, k_rows = tensors.q.shape[0], tensors.k.shape[0]
        sequences = self.plan.lengths.sequences(q_rows, k_rows, tensors.lengths)
        return Work(self.plan, Schedule.of(order, cta, num_ctas), sequences, scalars)

    @cute.jit
    def _attend(
        self,
        tensors: FwdTensors,
        scalars: FwdScalars,
        work: Work,
        tile: WorkTile,
        space: Space,
        products: Products,
        softmaxes: tuple,
    ):
        """One query tile: O and the softmaxes."""
        plan, thread = self.plan, cute.arch.thread_idx()[0]
        sequence, blocks = work.sequence_of(tile), work.blocks_of(tile)
        rows = []
        for m in cutlass.range_constexpr(plan.row_groups):
            place = self._place(tile, sequence, m)
            column = 2 * (place.lane % 4) + place.part * plan.keys_per_warp
            mask = Mask(work.window_of(tile), plan.tile_n, place.row, column)
            factors = SoftmaxScale(scalars.scale_log2)
            scores = Scores.of(plan, scalars, factors, mask, softmaxes[m])
            rows.append(Rows(scores, softmaxes[m]))
        loads = self._loads(tensors, tile, sequence, blocks, space, thread)
        loads.start(tile.m_block)
        attend(products, tuple(rows), loads, blocks)

    @cute.jit
    def _store(
        self,
        tensors: FwdTensors,
        sequence: Sequence,
        tile: WorkTile,
        space: Space,
        products: Products,
        softmaxes: tuple,
    ):
        plan, totals, sink = self.plan, Totals.empty(), tensors.sink_of(tile)
        for m in cutlass.range_constexpr(plan.row_groups):
            acc_O, place = products.groups[m].acc_O, self._place(tile, sequence, m)
            softmaxes[m].finish(acc_O, totals, sink, products.pair)
            queries = sequence.queries
            # Of a pair the first warp stores it: the lanes of the other one seem to have no row.
            lane = place.lane | place.part
            totals.store_lse(tensors.lse, queries, tile.head, place.row, lane)
            store_output(tensors.o, acc_O, plan.o, space.q, place, products.pair)

    @cute.jit
    def _wait_for_space_of_o(self):
        """A warp's rows of O lie where its rows of Q were, unless their chunks lie differently.

        With one stage all warps have met since their last S = Q K^T; and the two of a pair, who
        share rows, meet as they finish their sums.
        """
        plan = self.plan
        if cutlass.const_expr(plan.q.columns == plan.o.columns or plan.config.num_stages == 1):
            if cutlass.const_expr(not plan.has_pairs):
                cute.arch.sync_warp()
        else:
            cute.arch.sync_threads()

    def _place(self, tile: WorkTile, sequence: Sequence, m: int) -> Place:
        """Of the m-th row group."""
        lane, warp = _lane_and_warp()
        first = self.plan.first_rows(warp)[m]
        first_row, part = tile.m_block * self.plan.tile_m, self.plan.part(warp)
        return Place(tile, sequence, lane, first_row, first, part)

    def _loads(self, tensors: FwdTensors, tile: WorkTile, sequence, blocks, space: Space, thread):
        plan, queries, keys = self.plan, sequence.queries, sequence.keys
        threads = plan.config.num_threads
        q = queries.matrix(tensors.q, tile.head)
        k, v = (keys.matrix(t, tile.head_kv) for t in (tensors.k, tensors.v))
        of_qk = kept(RowCopy.thread_offset(plan.k, thread))
        of_v = of_qk
        if plan.v.columns != plan.k.columns:
            of_v = kept(RowCopy.thread_offset(plan.v, thread))
        return Loads(
            plan.config.num_stages,
            RowCopy.of(plan.q, threads, thread, q, queries.length, space.q, of_qk),
            RowCopy.of(plan.k, threads, thread, k, keys.length, space.k, of_qk),
            RowCopy.of(plan.v, threads, thread, v, keys.length, space.v, of_v),
            blocks,
        )


def _lane_and_warp() -> tuple:
    thread = cute.arch.thread_idx()[0]
    return thread % 32, cute.arch.make_warp_uniform(thread // 32)


def forward(signature: Signature, config: Sm80Config) -> ForwardSm80:
    """The forward kernel for fp16 and bf16."""
    return ForwardSm80(signature, config)
