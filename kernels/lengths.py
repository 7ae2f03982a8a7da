"""EqualLengths and RaggedLengths: what the lengths of a call put into a kernel's places."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_tensor

from .arguments import FwdArguments
from .scheduler import TileOrder
from .sequence import RaggedSequences, RaggedSpans, Sequences, ragged_view


@dataclass(frozen=True)
class EqualLengths:
    """Dense tensors, all rows of which count."""

    plan: Any

    def example(self) -> tuple:
        """Of FwdArguments.cu_seqlens_q to num_sequences."""
        return (None,) * 6

    def view(self, tensor: cute.Tensor, row_mode: int) -> cute.Tensor:
        """A tensor as TMA is to see it, which Span.tiled cuts."""
        return tensor

    def given(self, arguments: FwdArguments) -> None:
        """What tells lengths, besides the rows of the tensors."""

    def sequences(self, q_rows, k_rows, given: None) -> Sequences:
        return Sequences(q_rows, k_rows)

    def order(self, arguments: FwdArguments, stream) -> TileOrder:
        batches, s_q, heads, _ = arguments.q.shape
        _, s_k, heads_kv, d = arguments.k.shape
        num_m_blocks = cute.ceil_div(s_q, self.plan.tile_m)
        longest_first = self.plan.signature.mask != "full"
        heads_per_group = Int32(1)
        if longest_first:
            key_bytes = (d + arguments.v.shape[3]) * (arguments.k.element_type.width // 8)
            heads_per_group = TileOrder.group_of(
                key_bytes, s_k, num_m_blocks, heads, heads_kv, batches, arguments.num_ctas
            )
        return TileOrder.of(longest_first, num_m_blocks, heads, heads_kv, batches, heads_per_group)


@dataclass(frozen=True)
class GivenLengths:
    """Fields of FwdArguments."""

    num_sequences: Int32
    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    seqused_q: cute.Tensor
    seqused_k: cute.Tensor


@dataclass(frozen=True)
class RaggedLengths:
    """Lengths on the device: of packed tensors, or of the first rows of dense ones."""

    plan: Any

    def example(self) -> tuple:
        def numbers():
            return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=4)

        return *(numbers() for _ in range(5)), Int32(1)

    def view(self, tensor: cute.Tensor, row_mode: int) -> cute.Tensor:
        return ragged_view(tensor, row_mode)

    def given(self, arguments: FwdArguments) -> GivenLengths:
        return GivenLengths(
            arguments.num_sequences,
            arguments.cu_seqlens_q,
            arguments.cu_seqlens_k,
            arguments.seqused_q,
            arguments.seqused_k,
        )

    def sequences(self, q_rows, k_rows, given: GivenLengths) -> RaggedSequences:
        queries = RaggedSpans(q_rows, given.cu_seqlens_q, given.seqused_q)
        keys = RaggedSpans(k_rows, given.cu_seqlens_k, given.seqused_k)
        return RaggedSequences(given.num_sequences, queries, keys)

    def order(self, arguments: FwdArguments, stream) -> TileOrder:
        heads, heads_kv = arguments.q.shape[2], arguments.k.shape[2]
        num_m_blocks = cute.ceil_div(arguments.q.shape[1], self.plan.tile_m)
        return TileOrder.of(False, num_m_blocks, heads, heads_kv, arguments.num_sequences, Int32(1))
