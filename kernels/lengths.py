"""EqualLengths and RaggedLengths: what the lengths of a call put into a kernel's places."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_tensor

from .arguments import FwdArguments
from .arithmetic import maximum, minimum
from .bwd_arguments import BwdArguments
from .ctas import MAX_CTAS
from .scheduler import L2_BUDGET, TileList, TileOrder
from .sequence import PagedSpans, RaggedSequences, RaggedSpans, Sequences, ragged_view
from .simple.list_arguments import ListArguments
from .simple.rounds import Slots
from .simple.schedule import ListTiles


@dataclass(frozen=True)
class EqualLengths:
    """Dense tensors, all rows of which count."""

    plan: Any

    def example(self) -> tuple:
        """Of cu_seqlens_q to num_sequences of FwdArguments and BwdArguments."""
        is_dynamic = self.plan.tiling.is_dynamic
        counter = make_fake_tensor(Int32, (1,), (1,), assumed_align=4) if is_dynamic else None
        return *(None,) * 5, counter, None

    def view(self, tensor: cute.Tensor, row_mode: int) -> cute.Tensor:
        """A tensor as TMA is to see it, which Span.tiled cuts."""
        return tensor

    def given(self, arguments: FwdArguments | BwdArguments) -> None:
        """What tells lengths, besides the rows of the tensors."""

    def sequences(self, q_rows, k_rows, given: None) -> Sequences:
        return Sequences(q_rows, k_rows)

    def order(self, arguments: FwdArguments | BwdArguments, stream) -> TileOrder:
        x, tiling = arguments, self.plan.tiling
        cut, shared = tiling.sides(x.q, x.k)
        # A cluster's last tile of a head may have no rows: it takes part, and TMA stores nothing.
        num_blocks = cute.ceil_div(cut.shape[1], tiling.size * tiling.cluster) * tiling.cluster
        batches, heads = x.q.shape[0], tiling.heads(x)
        longest_first = tiling.mask != "full"
        heads_per_group = Int32(1)
        if longest_first:
            sizes = num_blocks, *heads, batches, x.num_ctas
            heads_per_group = TileOrder.group_of(tiling.shared_bytes(x), shared.shape[1], *sizes)
        counter = x.tiles.iterator if tiling.is_dynamic else None
        sizes = num_blocks, *heads, batches, heads_per_group
        return TileOrder.of(longest_first, *sizes, counter=counter, cluster=tiling.cluster)


@dataclass(frozen=True)
class GivenLengths:
    """Fields of FwdArguments and BwdArguments."""

    num_sequences: Int32
    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    seqused_q: cute.Tensor
    seqused_k: cute.Tensor
    page_table: cute.Tensor | None
    cache_leftpad: cute.Tensor | None


@dataclass(frozen=True)
class RaggedLengths:
    """Lengths on the device: of packed tensors, of the first rows of dense ones, or of pages."""

    plan: Any

    def example(self) -> tuple:
        def numbers(alignment: int):
            return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=alignment)

        pages = None
        if self.plan.signature.page_rows:
            shape, strides = (cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(), 1)
            pages = make_fake_tensor(Int32, shape, strides, assumed_align=4)
        return *(numbers(4) for _ in range(4)), pages, numbers(16), Int32(1)

    def view(self, tensor: cute.Tensor, row_mode: int) -> cute.Tensor:
        return ragged_view(tensor, row_mode)

    def given(self, arguments: FwdArguments | BwdArguments) -> GivenLengths:
        return GivenLengths(
            arguments.num_sequences,
            arguments.cu_seqlens_q,
            arguments.cu_seqlens_k,
            arguments.seqused_q,
            arguments.seqused_k,
            arguments.page_table,
            arguments.cache_leftpad,
        )

    def sequences(self, q_rows, k_rows, given: GivenLengths) -> RaggedSequences:
        queries = RaggedSpans(q_rows, given.cu_seqlens_q, given.seqused_q)
        if given.page_table is None:
            keys = RaggedSpans(k_rows, given.cu_seqlens_k, given.seqused_k)
        else:
            rows = self.plan.rows_at_once
            of_keys = given.page_table, given.seqused_k, given.cache_leftpad
            keys = PagedSpans(k_rows, *of_keys, rows)
        return RaggedSequences(given.num_sequences, queries, keys)

    def order(self, arguments: FwdArguments | BwdArguments, stream) -> TileList:
        """Has it written first, by a kernel of its own, unless a forward call brings it."""
        x, tiling = arguments, self.plan.tiling
        cut, _ = tiling.sides(x.q, x.k)
        cu_seqlens, _ = tiling.sides(x.cu_seqlens_q, x.cu_seqlens_k)
        is_packed = minimum(cu_seqlens.shape[0], 1)
        heads, heads_shared = tiling.heads(x)
        call = ListArguments(
            sequences=self.sequences(x.q.shape[1], x.k.shape[1], self.given(x)),
            slots=Slots.of(tiling.size, x.num_sequences, cut.shape[1], is_packed),
            num_heads=heads,
            num_heads_kv=heads_shared,
            window_left=x.window_left,
            window_right=x.window_right,
            max_ctas=x.num_ctas,
            rows_in_l2=L2_BUDGET // tiling.shared_bytes(x),
            memory=x.tiles,
            rows_per_query=tiling.rows_per_query(x),
            num_splits=tiling.num_splits(x),
        )
        is_listed = tiling.is_listed(x)
        if is_listed is None:
            ListTiles(tiling)(call, stream)
            return call.tiles()
        _list_unless(is_listed, tiling, call, stream)
        # All CTAs that have a place in it: it may have been made for more tiles than these.
        return TileList.of(call.memory, maximum(call.places.num_tiles, is_listed * MAX_CTAS))


@cute.jit
def _list_unless(is_listed: Int32, tiling: cutlass.Constexpr, call: ListArguments, stream):
    if is_listed == 0:
        ListTiles(tiling)(call, stream)
