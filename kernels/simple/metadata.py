"""The list of a forward call's tiles, made ahead of the call, for all layers of a step."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from ..arithmetic import minimum
from ..ctas import HOPPER_CTAS
from ..sequence import RaggedSequences, RaggedSpans
from ..signature import MaskKind
from ..tiling import QueryTiles
from .list_arguments import ListArguments
from .rounds import Slots
from .schedule import ListTiles


@dataclass(frozen=True)
class ListSignature:
    mask: MaskKind
    tile_m: int
    tile_n: int
    is_dynamic: bool = False  # of the call's kernel
    max_ctas: int = HOPPER_CTAS  # QueryTiles.max_ctas


class ListQueries:
    """The kernel of one ListSignature."""

    def __init__(self, signature: ListSignature, config: None = None):
        self.tiling = QueryTiles(
            signature.mask,
            signature.tile_m,
            signature.tile_n,
            signature.is_dynamic,
            max_ctas=signature.max_ctas,
        )

    def example_args(self) -> tuple:
        def numbers(alignment=4):
            return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=alignment)

        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return numbers(16), numbers(), numbers(), *[Int32(1)] * 11, stream

    @cute.jit
    def __call__(  # noqa: PLR0913
        self,
        memory: cute.Tensor,
        cu_seqlens_q: cute.Tensor,  # (b + 1,), or (0,) of dense q
        seqused_k: cute.Tensor,  # (b,)
        rows_q: Int32,
        rows_k: Int32,
        num_sequences: Int32,
        num_heads: Int32,  # each split of a head is one
        num_heads_kv: Int32,
        window_left: Int32,
        window_right: Int32,
        max_ctas: Int32,
        rows_in_l2: Int32,
        rows_per_query: Int32,
        num_splits: Int32,
        stream,
    ):
        all_rows = cute.make_tensor(seqused_k.iterator, cute.make_layout((Int32(0),)))
        queries = RaggedSpans(rows_q, cu_seqlens_q, all_rows)
        keys = RaggedSpans(rows_k, all_rows, seqused_k)
        is_packed = minimum(cu_seqlens_q.shape[0], 1)
        call = ListArguments(
            RaggedSequences(num_sequences, queries, keys),
            Slots.of(self.tiling.size, num_sequences, rows_q, is_packed),
            num_heads,
            num_heads_kv,
            window_left,
            window_right,
            max_ctas,
            rows_in_l2,
            memory,
            rows_per_query,
            num_splits,
        )
        ListTiles(self.tiling)(call, stream)
