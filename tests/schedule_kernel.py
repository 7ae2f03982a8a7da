"""kernels/simple/schedule.py and CTAs that walk through its list, as fa3.jit compiles kernels."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fa3.kernels.ctas import HOPPER_CTAS
from fa3.kernels.scheduler import Schedule, TileList
from fa3.kernels.sequence import RaggedSequences, RaggedSpans
from fa3.kernels.signature import MaskKind
from fa3.kernels.simple.list_arguments import ListArguments
from fa3.kernels.simple.rounds import Slots
from fa3.kernels.simple.schedule import ListTiles
from fa3.kernels.tiling import KeyTiles, QueryTiles

COLUMNS = 5  # of a tile that was found: CTA, batch, m_block, head, head_kv


@dataclass(frozen=True)
class ListSignature:
    mask: MaskKind
    tiles: str = "queries"  # keys, keys in order


@dataclass(frozen=True)
class ListConfig:
    tile_m: int = 128
    tile_n: int = 128
    is_dynamic: bool = False  # then there is a list, and nobody walks
    max_ctas: int = HOPPER_CTAS


def tiling_of(signature: ListSignature, config: ListConfig) -> QueryTiles | KeyTiles:
    sizes = signature.mask, config.tile_m, config.tile_n
    if signature.tiles == "queries":
        return QueryTiles(*sizes, config.is_dynamic, max_ctas=config.max_ctas)
    return KeyTiles(*sizes, signature.tiles == "keys in order", config.max_ctas)


class ListAndWalk:
    def __init__(self, signature: ListSignature, config: ListConfig):
        self.signature = signature
        self.config = config

    def example_args(self) -> tuple:
        def numbers(alignment=4):
            return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=alignment)

        found = make_fake_tensor(Int32, (cute.sym_int32(), COLUMNS), (COLUMNS, 1), assumed_align=4)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return numbers(16), found, *(numbers() for _ in range(4)), *[Int32(1)] * 9, stream

    @cute.jit
    def __call__(  # noqa: PLR0913
        self,
        memory: cute.Tensor,
        found: cute.Tensor,  # (tiles, COLUMNS): by position in the list
        cu_q: cute.Tensor,
        cu_k: cute.Tensor,
        used_q: cute.Tensor,
        used_k: cute.Tensor,
        rows_q: Int32,
        rows_k: Int32,
        num_sequences: Int32,
        num_heads: Int32,
        num_heads_kv: Int32,
        left: Int32,
        right: Int32,
        max_ctas: Int32,
        rows_in_l2: Int32,
        stream,
    ):
        queries, keys = RaggedSpans(rows_q, cu_q, used_q), RaggedSpans(rows_k, cu_k, used_k)
        tiling = tiling_of(self.signature, self.config)
        rows, _ = tiling.sides(rows_q, rows_k)
        cu_seqlens, _ = tiling.sides(cu_q, cu_k)
        is_packed = cutlass.min(cu_seqlens.shape[0], 1)
        arguments = ListArguments(
            RaggedSequences(num_sequences, queries, keys),
            Slots.of(tiling.size, num_sequences, rows, is_packed),
            num_heads,
            num_heads_kv,
            left,
            right,
            max_ctas,
            rows_in_l2,
            memory,
        )
        ListTiles(tiling)(arguments, stream)
        if cutlass.const_expr(not tiling.is_dynamic):
            tiles = arguments.tiles()
            self.walk(tiles, found).launch(
                grid=(cutlass.min(max_ctas, tiles.count), 1, 1), block=(32, 1, 1), stream=stream
            )

    @cute.kernel
    def walk(self, tiles: TileList, found: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        schedule = Schedule.of(tiles, cta, num_ctas)
        tile = schedule.first()
        while tile.is_valid:
            if cute.arch.thread_idx()[0] == 0:
                row = schedule.deal[tile.turn]
                entry = (cta, tile.batch, tile.m_block, tile.head, tile.head_kv)
                for i in cutlass.range_constexpr(COLUMNS):
                    found[row, i] = entry[i]
            tile = schedule.next(tile)
