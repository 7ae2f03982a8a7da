"""The forward kernel for one-byte inputs: what fwd.py has, but

    producer   warp 0: TMA as ever; warps 1 to 3: V of each stage into a ring of its own, transposed
    consumers  S = Q K^T, softmax of scaled scores, P to e4m3, P V of each block on its own,
               O += P V in fp32; O leaves from registers

    TMA            K_n         | V_n     | K_n-1      | V_n-1   |
    transposing                |     V_n -> V^T_n     |     V_n-1 -> V^T_n-1   |
    consumers      | S_n | softmax, P_n to e4m3       | S_n-1, P_n V_n | O += | softmax ..

Two-level accumulation: the tensor core adds one-byte products in an accumulator of about 13
fraction bits; only the keys of one block meet there.

Sources: FlashAttention-3 (arXiv 2407.08608), section 3.3; DeepSeek-V3 (arXiv 2412.19437), section
3.3.2, on the accumulator.
"""

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator

from ..barriers import WARPGROUP, WarpgroupTurn
from ..config import FwdConfig
from ..mask import Mask
from ..scales import Scales
from ..signature import Signature
from ..tensors import FwdScalars, FwdTensors, permute
from .fp8_load import TRANSPOSING_WARPS, transpose
from .fp8_mma import Fp8Fragments
from .fp8_store import store_output
from .fwd import ForwardSm90, Tiles, tma_load
from .fwd_load import load
from .fwd_mma import accumulate_last, attend
from .fwd_store import store_lse
from .rings import FwdRings, Ring, swizzled
from .wgmma import Elements, FwdMma, FwdSmem, vt_layout


class ForwardFp8Sm90(ForwardSm90):
    """The forward kernel of one Signature with `quantised`, laid out by one FwdConfig."""

    def __init__(self, signature: Signature, config: FwdConfig):
        v_block = signature.quantised.v_block
        if v_block % config.tile_n:
            raise ValueError(
                f"tile_n={config.tile_n} does not divide v_block={v_block}: "
                "each product P V runs over keys that share a scale of v"
            )
        super().__init__(signature, config)

    def example_scales(self, batch, heads_k, dv) -> tuple:
        """The descales, and the shift of v by 16 bytes."""

        def scales(heads):
            strides = (cute.sym_int64(), cute.sym_int64(), cute.sym_int32())
            shape = (batch, heads, cute.sym_int32())
            return make_fake_tensor(Float32, shape, strides, assumed_align=4)

        strides = tuple(cute.sym_int64(divisibility=4) for _ in range(2))
        shift = make_fake_tensor(Float32, (batch, heads_k, dv), (*strides, 1), assumed_align=16)
        return scales(cute.sym_int32()), scales(heads_k), scales(heads_k), shift

    @cute.jit
    def __call__(  # noqa: PLR0913
        self,
        mQ: cute.Tensor,  # (b, s_q, h_q, d)
        mK: cute.Tensor,  # (b, s_k, h_k, d)
        mV: cute.Tensor,  # (b, s_k, h_k, dv)
        mO: cute.Tensor,  # (b, s_q, h_q, dv)
        mLSE: cute.Tensor,  # (b, h_q, s_q) fp32
        q_scales: cute.Tensor,  # (b, h_q or h_k, blocks) fp32
        k_scales: cute.Tensor,  # (b, h_k, blocks) fp32
        v_scales: cute.Tensor,  # (b, h_k, blocks or dv) fp32
        v_shift: cute.Tensor,  # (b, h_k, dv) fp32
        softmax_scale_log2: Float32,
        window_left: Int32,
        window_right: Int32,
        num_ctas: Int32,
        stream,
    ):
        plan = self.plan
        smem = FwdSmem.of(plan.signature, plan.config)
        q, k, o = (permute(t, [1, 3, 2, 0]) for t in (mQ, mK, mO))
        tensors = FwdTensors(
            q=tma_load(q, smem.q, plan.q_tile),
            k=tma_load(k, smem.k, plan.k_tile),
            v=tma_load(permute(mV, [3, 1, 2, 0]), smem.v, plan.v_tile),
            o=o,
            lse=permute(mLSE, [2, 1, 0]),
            scales=Scales(
                *(permute(t, [2, 1, 0]) for t in (q_scales, k_scales, v_scales, v_shift))
            ),
        )
        scalars = FwdScalars(softmax_scale_log2, window_left, window_right)
        self._launch(tensors, scalars, self._order(mQ, mK, mV, num_ctas), num_ctas, stream)

    def _shared_memory(self) -> tuple[FwdRings, None]:
        """Rings of Q, K, V and transposed V; O needs no space."""
        plan, allocator = self.plan, SmemAllocator()
        layouts, element = FwdSmem.of(plan.signature, plan.config), Elements.of(plan.signature)
        consumer_warps = 4 * plan.num_mma_warpgroups

        def ring(make, dtype, layout, readers):
            memory = allocator.allocate_array(dtype, cute.cosize(layout), byte_alignment=1024)
            barriers = allocator.allocate_array(cutlass.Int64, 2 * cute.size(layout, mode=[2]))
            return make(swizzled(memory, layout), barriers, readers)

        vt = vt_layout(plan.signature, plan.config)
        by_warps = partial(Ring.written_by, TRANSPOSING_WARPS)
        return FwdRings(
            q=ring(Ring.of, element.q, layouts.q, consumer_warps),
            k=ring(Ring.of, element.k, layouts.k, consumer_warps),
            v=ring(Ring.of, element.v, layouts.v, TRANSPOSING_WARPS),
            vt=ring(by_warps, element.v, vt, consumer_warps),
        ), None

    @cute.jit
    def _produce(self, warp, tensors: FwdTensors, rings: FwdRings, tiles: Tiles):
        if warp == 0:
            load(self.plan, tensors, rings, tiles)
        else:
            transpose(self.plan, rings, tiles, warp - 1, cute.arch.lane_idx())

    @cute.jit
    def _consume(
        self,
        tensors: FwdTensors,
        scalars: FwdScalars,
        rings: FwdRings,
        _: None,
        tiles: Tiles,
    ):
        plan = self.plan
        thread = cute.arch.thread_idx()[0] - WARPGROUP
        lane = thread % 32
        warp = cute.arch.make_warp_uniform(thread // 32)
        warpgroup = warp // 4
        mma = FwdMma.of(plan.signature, plan.config)
        fragments = Fp8Fragments.of(plan, mma, rings, warpgroup)
        softmax = plan.softmax()
        lse = cute.make_rmem_tensor(2, Float32)
        window = self._window(tensors, scalars)
        turn = WarpgroupTurn(warpgroup, plan.num_mma_warpgroups)
        turn.start()

        q, k, v = rings.q.consumer(), rings.k.consumer(), rings.vt.consumer()
        for wave in cutlass.range(tiles.count, unroll=1):
            tile = tiles[wave]
            blocks = tiles.blocks_of(tile)
            first_row = tile.m_block * plan.tile_m + 64 * warpgroup
            row = first_row + warp % 4 * 16 + lane // 4
            mask = Mask(window, plan.tile_n, row, 2 * (lane % 4))
            num_heads = tensors.lse.shape[1]
            scales = tensors.scales.of_tile(tile, first_row, num_heads, scalars.scale_log2, plan)
            frag = fragments.with_scales(scales)
            query = q.wait_and_advance()
            k, v = attend(frag, softmax, scales, mask, turn, k, v, blocks, False, _nothing)
            query.release()
            v, _ = accumulate_last(frag, v, blocks.n_min, _nothing, False)
            frag.take_sum(softmax)
            softmax.finish(frag.acc_O, lse)
            store_lse(tensors.lse[None, tile.head, tile.batch], lse, row, lane)
            store_output(tensors, frag, lse, tile, row, lane)


def _nothing():
    pass
