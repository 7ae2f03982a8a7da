"""FlashAttention-3 forward for Hopper: host side, shared memory and the table of roles.

Roles of a CTA (tile_m = 64 x consumers query rows):

    producer   warp 0 of warpgroup 0     TMA: Q (1 stage), K ring, V ring
    consumers  warpgroups 1, 2 (, 3)     S = Q K^T, online softmax, O += P V, O and LSE out

Two consumers in the steady state (docs/algorithm.md has the barriers):

    tensor cores |1: S_2 |1: PV_3|2: S_2 |2: PV_3|1: S_1 |1: PV_2|2: S_1 |2: PV_2|
    consumer 1   | wait  |scale S_2| exp2 .. P_2 | wait  |scale S_1| exp2 .. P_1 |
    consumer 2   |exp2 .. P_3    | wait  |scale S_2| exp2 .. P_2 | wait  |scale..|

Sources: FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from ...arguments import FwdArguments
from ...barriers import WARPGROUP, WarpgroupTurn
from ...config import FwdConfig, OSpace
from ...elements import ELEMENT, Elements
from ...example import forward_example
from ...headroom import HEADROOM_LOG2, LIMIT_LOG2
from ...lengths import EqualLengths, RaggedLengths
from ...mask import Mask
from ...scheduler import Schedule, TileList, TileOrder
from ...scores import Scores
from ...signature import Signature
from ...softmax import OnlineSoftmax, Totals
from ...tensors import FwdScalars, FwdTensors, RowsOperand, TmaOperand, permute
from ...tiling import QueryTiles
from ...work import Work
from ..cluster import Cluster
from ..gather import ByTma, Gather
from ..rings import FwdRings, Ring, part_of
from ..tile_queue import FetchedTiles, PostedTiles, TileBoard
from ..tma import tma_load, tma_load_parts
from ..wgmma import FwdMma, FwdSmem
from .attend import accumulate_last, attend
from .load import load
from .store import LastSlots, Place


@dataclass(frozen=True)
class FwdPlan:
    """The compile-time numbers that the roles share."""

    signature: Signature
    config: FwdConfig

    @property
    def element(self):
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
    def tiling(self) -> QueryTiles:
        is_dynamic = self.config.is_dynamic(self.signature)
        sizes = self.tile_m, self.tile_n
        return QueryTiles(self.signature.mask, *sizes, is_dynamic, self.config.cluster)

    @property
    def lengths(self) -> EqualLengths | RaggedLengths:
        return (RaggedLengths if self.signature.is_ragged else EqualLengths)(self)

    @property
    def rows_at_once(self) -> int:
        """Of paged keys: a copy brings so many rows, which share a page and divide a block."""
        return min(self.signature.page_rows, self.tile_n & -self.tile_n)

    @property
    def loading_warps(self) -> int:
        """Of the producer warpgroup. Rows are gathered by all that have nothing else to do."""
        signature = self.signature
        are_idle = signature.quantised is None and signature.widens is None
        return 4 if signature.gathers and are_idle else 1

    def source(self, warp) -> ByTma | Gather:
        """Of K and V, for a loading warp."""
        return Gather.of(self.loading_warps, warp) if self.signature.gathers else ByTma()

    @property
    def key_ring(self) -> Callable:
        """Makes a ring that K or V is loaded into."""
        gathers = self.signature.gathers
        if gathers:
            return partial(Ring.written_by, self.loading_warps)
        return partial(Ring.of, num_ctas=self.config.cluster)

    @property
    def o_space(self) -> OSpace:
        return self.config.space_of_o(self.signature)

    @property
    def keeps_last_k(self) -> bool:
        """O goes where a tile's last K block is."""
        return self.o_space in ("k", "kv")

    @property
    def keeps_last_v(self) -> bool:
        return self.o_space == "kv"

    @property
    def frees_v_first(self) -> bool:
        """A slot of V is free before that of the K ahead of it: V has been transposed by then."""
        return self.signature.quantised is not None

    @property
    def elements(self) -> tuple[int, int, int, int]:
        """Of Q, O, a K stage and a V stage."""
        return self.config.elements(self.signature)

    @property
    def head_dim_v(self) -> int:
        return self.signature.head_dim_v

    @property
    def num_mma_warpgroups(self) -> int:
        return self.config.num_mma_warpgroups

    @property
    def q_tile(self):
        return (self.config.tile_m, self.signature.head_dim)

    @property
    def k_tile(self):
        return (self.config.tile_n, self.signature.head_dim)

    @property
    def v_tile(self):
        """As TMA brings it: of the view (dv, s_k)."""
        return (self.signature.head_dim_v, self.config.tile_n)

    @property
    def o_tile(self):
        return (64, self.signature.head_dim_v)

    def softmax(self) -> OnlineSoftmax:
        dtype = self.signature.dtype
        polynomial = self.config.polynomial_exp2
        return OnlineSoftmax.of(HEADROOM_LOG2[dtype], LIMIT_LOG2[dtype], polynomial)


class ForwardSm90:
    """The forward kernel of one Signature, laid out by one FwdConfig.

    `operands` knows what dtypes the inputs have; the roles only call its methods.
    """

    def __init__(self, signature: Signature, config: FwdConfig, operands: Callable):
        """operands: makes the object that knows the dtypes, of a FwdPlan."""
        config.check(signature)
        self.plan = FwdPlan(signature, config)
        self.operands = operands(self.plan)

    def example_args(self) -> tuple:
        """Symbolic arguments of __call__ for cute.compile."""
        element = Elements.in_memory(self.plan.signature)
        return forward_example(self.plan, element, self.operands.example_scales)

    @cute.jit
    def __call__(self, arguments: FwdArguments, stream):
        plan = self.plan
        smem = FwdSmem.in_memory(plan.signature, plan.config)
        q, k, o = (permute(t, [1, 3, 2, 0]) for t in (arguments.q, arguments.k, arguments.out))
        v = permute(arguments.v, [3, 1, 2, 0])
        view = plan.lengths.view
        tensors = FwdTensors(
            q=tma_load(view(q, 0), smem.q, plan.q_tile),
            k=self._of_keys(k, smem.k, plan.k_tile, 0),
            v=self._of_keys(v, smem.v, plan.v_tile, 1),
            o=self.operands.output(o),
            lse=permute(arguments.lse, [2, 1, 0]),
            scales=self.operands.scales(arguments),
            sinks=permute(arguments.sinks, [1, 0]) if plan.signature.sinks else None,
            lengths=plan.lengths.given(arguments),
        )
        scalars = FwdScalars(
            arguments.scale_log2,
            arguments.softcap_log2,
            arguments.window_left,
            arguments.window_right,
            arguments.num_splits,
            arguments.rows_per_query,
        )
        order = plan.lengths.order(arguments, stream)
        cluster = Cluster(plan.config.cluster)
        self.kernel(tensors, scalars, order).launch(
            grid=(cluster.whole(cutlass.min(arguments.num_ctas, order.count)), 1, 1),
            block=(plan.config.num_threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            **cluster.launch,
        )

    def _of_keys(self, tensor: cute.Tensor, smem, tile, row_mode: int) -> TmaOperand | RowsOperand:
        """K or V, block by block, page by page, or row by row."""
        if self.plan.signature.gathers:
            return RowsOperand(tensor if row_mode == 0 else permute(tensor, [1, 0, 2, 3]))
        tensor = self.plan.lengths.view(tensor, row_mode)
        if not self.plan.signature.page_rows:
            return tma_load(tensor, smem, tile, self.plan.config.cluster)
        return tma_load_parts(tensor, smem, part_of(tile, row_mode, self.plan.rows_at_once))

    @cute.kernel
    def kernel(self, tensors: FwdTensors, scalars: FwdScalars, order: TileOrder | TileList):
        plan = self.plan
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in tensors.tma_atoms:
                cpasync.prefetch_descriptor(atom)
        allocator = SmemAllocator()
        rings, o_pointer = self.operands.shared_memory(allocator)
        loading, work = self._work(tensors, scalars, order, allocator)
        cute.arch.mbarrier_init_fence()
        cluster = Cluster(plan.config.cluster)
        cluster.start()

        if warp < 4:
            cute.arch.setmaxregister_decrease(plan.config.producer_registers)
            self._produce(warp, tensors, rings, loading, work)
        else:
            cute.arch.setmaxregister_increase(plan.config.consumer_registers)
            self._consume(tensors, scalars, rings, o_pointer, work)
        cluster.end()

    @cute.jit
    def _produce(self, warp, tensors: FwdTensors, rings: FwdRings, loading: Work, work: Work):
        """The producer warpgroup: all tiles of this CTA."""
        warps = self.plan.loading_warps
        # One warp as an equation: else ptxas finds too few registers for those that transpose V.
        if warp == 0 if warps == 1 else warp < warps:
            load(self.plan, tensors, rings, loading, 0 if warps == 1 else warp)
        else:
            self.operands.assist(rings, work, warp - 1, cute.arch.lane_idx())

    def _work(
        self, tensors: FwdTensors, scalars: FwdScalars, order, allocator
    ) -> tuple[Work, Work]:
        """As the producer warp goes through it, and as the others do."""
        cta, num_ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        q_rows, k_rows = tensors.q.tensor.shape[0], tensors.k.tensor.shape[0]
        sequences = self.plan.lengths.sequences(q_rows, k_rows, tensors.lengths)
        if self.plan.tiling.is_dynamic:
            board = TileBoard.of(allocator)
            schedules = FetchedTiles.of(order, cta, num_ctas, board), PostedTiles(board)
        else:
            schedules = (Schedule.of(order, cta, num_ctas),) * 2
        return tuple(Work(self.plan, schedule, sequences, scalars) for schedule in schedules)

    @cute.jit
    def _consume(
        self,
        tensors: FwdTensors,
        scalars: FwdScalars,
        rings: FwdRings,
        o_pointer: cute.Pointer,
        work: Work,
    ):
        """A consumer warpgroup: all tiles of this CTA."""
        plan = self.plan
        thread = cute.arch.thread_idx()[0] - WARPGROUP
        lane = thread % 32
        warp = cute.arch.make_warp_uniform(thread // 32)
        warpgroup = warp // 4

        operands = self.operands
        fragments = operands.fragments(FwdMma.of(plan.signature, plan.config), rings, warpgroup)
        softmax = plan.softmax()
        totals = Totals.empty()
        space = operands.output_space(o_pointer, warp)
        turn = WarpgroupTurn(warpgroup, plan.num_mma_warpgroups)
        turn.start()

        q, k, v = rings.q.consumer(), rings.k.consumer(), rings.v.consumer()
        last = LastSlots(Int32(0), Int32(0))
        tile = work.first()
        while tile.is_valid:
            blocks = work.blocks_of(tile)
            first_row = tile.m_block * plan.tile_m + 64 * warpgroup
            row = first_row + warp % 4 * 16 + lane // 4
            place = Place(tile, work.sequence_of(tile), thread, first_row, row)
            mask = Mask(work.window_of(tile), plan.tile_n, row, 2 * (lane % 4))
            frag, factors = operands.of_tile(fragments, tensors, scalars, place)
            query = q.wait_and_advance()
            scores = Scores.of(plan, scalars, factors, mask, softmax)
            give_back = partial(space.give_back, rings, last, tile.turn)
            k, v = attend(frag, scores, softmax, turn, k, v, blocks, plan.keeps_last_k, give_back)
            space.scores_done(query, tile.turn)
            sink = work.sink_of(tile, tensors)  # arrives beside the last product
            look_ahead = partial(work.next, tile)
            v, next_tile = accumulate_last(frag, v, blocks.n_min, look_ahead, plan.keeps_last_v)
            space.output_done(tile.turn)
            last = LastSlots(rings.k.slot_before(k), rings.v.slot_before(v))
            frag.take_sum(softmax)
            softmax.finish(frag.acc_O, totals, sink)
            queries = place.sequence.queries
            totals.store_lse(tensors.lse, queries, tile.head, row, thread)
            space.store(tensors, frag, totals, place, last)
            space.stored(query)
            tile = next_tile
        space.drain()
