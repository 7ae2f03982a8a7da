"""Backward pass for Hopper: three kernels, and the second one's shared memory and roles.

    prepare    simple/bwd_prepare.py     delta = rowsum(dO * O) - dlse, lse in base 2, dQ's sums = 0
    backward   here                      dK and dV of a tile of keys, dQ added to its sums
    finish     finish.py                 dQ from fp32 to 16 bits

Without dQ (BwdSignature.with_dq) its sums, its product and the last kernel are left out, without dK
and dV (with_dkv) theirs and their stores.

P is computed again from Q, K and lse.  A CTA has a tile of tile_n keys of one key head, and visits
all blocks of tile_m queries that see them, of every query head that reads the key head:

    producer   warp 0 of warpgroup 0     TMA: K, V of a tile; rings of Q with lse, dO with delta
    consumers  warpgroups 1, 2           S^T = K Q^T             P^T = exp2(S^T scale - lse)
                                         dP^T = V dO^T - delta   dS^T = P^T dP^T
                                         dV += P^T dO            dK += dS^T Q        in registers
                                         dQ = dS K               added to fp32 in global memory

    tensor cores | dQ    dV    dK    S^T    dP^T  | those of the other warpgroup  |
    a consumer   |       dQ to L2                 | P^T = exp2 ..  dS^T to shared |

dQ of a block needs dS of both warpgroups.  It is multiplied a step late, when the other one's dS
has long been there: neither waits for the other, and one computes while the other multiplies
(differentiate.py).  dQ leaves in the order of the accumulators: each warp writes its part to shared
memory and has it added in bulk (dq.py).  dP is less delta because a product says so: of minus one
by three 16-bit parts of delta, a k-step more of the same accumulators.

Registers of a consumer thread at head dim 128: dK and dV 128, S and dP 64 or P and dS in 16 bits
and dQ 64.  At 64, with blocks of 128 queries: 64 and 128.  From 192 on the two warpgroups have
products of their own, not keys (sides.py).

Sources: FlashAttention-2 (arXiv 2307.08691), section 3.1; FlashAttention-3 (arXiv 2407.08608),
section 3.1.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from ...barriers import WARPGROUP
from ...bwd_arguments import BwdArguments
from ...bwd_config import BwdConfig
from ...bwd_example import backward_example
from ...bwd_signature import BwdSignature
from ...bwd_work import BwdScalars, BwdWork, KeyTile
from ...key_mask import KeyMask, QueryRows
from ...scheduler import Schedule, TileList, TileOrder
from ...scores import KeyScores
from ...simple.bwd_clear import Clear, Gradients
from ...simple.bwd_prepare import Prepare, PrepareTensors
from ...tensors import permute
from ..tma import tma_load, tma_store
from .differentiate import differentiate, differentiate_channels
from .dq import DqSums, wait_for_dq
from .finish import Finish
from .load import load
from .plan import BwdPlan
from .products import BwdFragments, BwdSmem
from .rings import BwdRings
from .sides import Side, make_ds_and_dk, make_p_and_dv
from .store import store_gradients, store_side
from .tensors import BwdTensors


class BackwardSm90:
    """The backward pass of one BwdSignature, laid out by one BwdConfig."""

    def __init__(self, signature: BwdSignature, config: BwdConfig):
        config.check(signature)
        self.plan = BwdPlan(signature, config)

    def example_args(self) -> tuple:
        """Symbolic arguments of __call__ for cute.compile."""
        return backward_example(self.plan)

    @cute.jit
    def __call__(self, arguments: BwdArguments, stream):
        plan, x = self.plan, arguments
        smem = BwdSmem.of(plan.signature, plan.config)
        q, k, v = (permute(t, [1, 3, 2, 0]) for t in (x.q, x.k, x.v))
        dq, dk, dv = (None if t is None else permute(t, [1, 3, 2, 0]) for t in (x.dq, x.dk, x.dv))
        given = PrepareTensors.of(x)
        lengths, view = plan.lengths.given(x), plan.lengths.view
        sequences = plan.lengths.sequences(q.shape[0], k.shape[0], lengths)
        Prepare(plan.config.tile_m, plan.signature.head_dim_v)(given, sequences, stream)
        tensors = BwdTensors(
            q=tma_load(view(q, 0), smem.q, plan.q_tile),
            k=tma_load(view(k, 0), smem.k, plan.k_tile),
            v=tma_load(view(v, 0), smem.v, plan.v_tile),
            do=tma_load(view(given.dout, 0), smem.do, plan.do_tile),
            dk=None if dk is None else tma_store(view(dk, 0), smem.k, plan.k_tile),
            dv=None if dv is None else tma_store(view(dv, 0), smem.v, plan.v_tile),
            row_stats=given.row_stats,
            delta_parts=given.delta_parts,
            dq_sums=given.dq_sums,
            dq_counters=given.dq_counters,
            lengths=lengths,
        )
        order = plan.lengths.order(x, stream)
        self.kernel(tensors, BwdScalars.of(x), order).launch(
            grid=(cutlass.min(x.num_ctas, order.count), 1, 1),
            block=(plan.config.num_threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )
        if cutlass.const_expr(plan.signature.with_dq):
            Finish(plan)(given.dq_sums, dq, sequences, x.softmax_scale, stream)
        if cutlass.const_expr(plan.signature.is_ragged):
            Clear()(Gradients(dq, dk, dv), sequences, stream)

    @cute.kernel
    def kernel(self, tensors: BwdTensors, scalars: BwdScalars, order: TileOrder | TileList):
        plan = self.plan
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in tensors.tma_atoms:
                cpasync.prefetch_descriptor(atom)
        rings = BwdRings.of(plan, SmemAllocator())
        rings.start(plan, cute.arch.thread_idx()[0])
        work = self._work(tensors, scalars, order)
        cute.arch.sync_threads()

        if warp < 4:
            cute.arch.setmaxregister_decrease(plan.config.producer_registers)
            if warp == 0:
                load(plan, tensors, rings, work)
        else:
            cute.arch.setmaxregister_increase(plan.config.consumer_registers)
            if cutlass.const_expr(plan.config.splits_products):
                if warp < 8:
                    self._share(tensors, scalars, rings, work, is_first=True)
                else:
                    self._share(tensors, scalars, rings, work, is_first=False)
            else:
                self._consume(tensors, scalars, rings, work)

    def _work(self, tensors: BwdTensors, scalars: BwdScalars, order) -> BwdWork:
        schedule = Schedule.of(order, cute.arch.block_idx()[0], cute.arch.grid_dim()[0])
        q, k = tensors.q.tensor, tensors.k.tensor
        return BwdWork.of(self.plan, tensors, q, k, scalars, schedule)

    def _mask(self, work: BwdWork, tile: KeyTile, warp, lane) -> KeyMask:
        """Where this thread's scores lie in a tile."""
        config = self.plan.config
        row = tile.n_block * config.tile_n + lane // 4
        column = 2 * (lane % 4)
        if config.splits_keys:
            row += 16 * warp
        else:
            row += 16 * (warp % 4)
            column += config.score_columns * (warp // 4)
        return KeyMask(work.window_of(tile), config.tile_m, row, column)

    @cute.jit
    def _consume(self, tensors: BwdTensors, scalars: BwdScalars, rings: BwdRings, work: BwdWork):
        """A consumer warpgroup: all tiles of this CTA."""
        plan = self.plan
        thread = cute.arch.thread_idx()[0] - WARPGROUP
        lane = thread % 32
        warp = cute.arch.make_warp_uniform(thread // 32)
        own = warp // 4
        frag = BwdFragments.of(plan, rings, own)
        buffer = Int32(0)  # of dS of the next step
        if cutlass.const_expr(plan.config.splits_keys and plan.signature.with_dq):
            plan.barriers.hand_on_ds(own, buffer)
        k, v, q, do = (ring.consumer() for ring in (rings.k, rings.v, rings.q, rings.do))
        tile = work.first()
        while tile.is_valid:
            blocks = work.blocks_of(tile)
            scores = KeyScores.of(plan, scalars, self._mask(work, tile, warp, lane))
            frag.start()
            k.wait_and_advance()
            v.wait_and_advance()
            frag.load_v(thread)
            for i in cutlass.range(work.heads_per_group, unroll=1):
                head = tile.head_kv * work.heads_per_group + i
                sums = DqSums.of(work, tile, head, thread, rings.dq)
                if cutlass.const_expr(plan.config.splits_keys):
                    q, do, buffer = differentiate(
                        frag, rings, q, do, blocks, scores, sums, thread, buffer
                    )
                else:
                    q, do = differentiate_channels(frag, rings, q, do, blocks, scores, sums, thread)
                if cutlass.const_expr(sums is not None):
                    sums.finish(blocks.m_min)
            keys = work.sequence_of(tile).keys
            is_storing = warp == 0
            store_gradients(
                frag, rings, tensors, tile, keys, thread, is_storing, scalars.softmax_scale
            )
            tile = work.next(tile)
        wait_for_dq(plan, rings.dq)

    @cute.jit
    def _share(
        self,
        tensors: BwdTensors,
        scalars: BwdScalars,
        rings: BwdRings,
        work: BwdWork,
        is_first: cutlass.Constexpr[bool],
    ):
        """A consumer warpgroup that has some of the products: all tiles of this CTA."""
        plan = self.plan
        consumer = cute.arch.thread_idx()[0] - WARPGROUP
        thread = consumer % WARPGROUP
        lane = thread % 32
        warp = cute.arch.make_warp_uniform(thread // 32)
        row, column = 16 * warp + lane // 4, 2 * (lane % 4)
        side = Side.of(plan, rings, is_first)
        # Of K and V the one that its scores need; P's barrier, or that of the tile's last products,
        # comes ahead of any use of the other one.
        own, q, do = (
            ring.consumer() for ring in (rings.k if is_first else rings.v, rings.q, rings.do)
        )
        tile = work.first()
        while tile.is_valid:
            blocks = work.blocks_of(tile)
            side.start()
            own.wait_and_advance()
            for i in cutlass.range(work.heads_per_group, unroll=1):
                head = tile.head_kv * work.heads_per_group + i
                sums = DqSums.of(work, tile, head, consumer, rings.dq)
                if cutlass.const_expr(is_first):
                    tile_m, tile_n = plan.config.tile_m, plan.config.tile_n
                    window = work.window_of(tile)
                    mask = QueryRows(window, tile_m, tile_n, tile.n_block, row, column)
                    scores = KeyScores.of(plan, scalars, mask)
                    q, do = make_p_and_dv(side, rings, q, do, blocks, scores, sums, thread)
                else:
                    q, do = make_ds_and_dk(side, rings, q, do, blocks, row, sums, thread)
                if cutlass.const_expr(sums is not None):
                    sums.finish(blocks.m_min)
            keys = work.sequence_of(tile).keys
            is_storing = warp == 0
            factor = None if is_first else scalars.softmax_scale
            store_side(side, rings, tensors, tile, keys, thread, is_storing, is_first, factor)
            tile = work.next(tile)
        wait_for_dq(plan, rings.dq)
