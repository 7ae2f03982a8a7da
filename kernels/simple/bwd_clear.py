"""The kernel that clears gradients of rows that belong to nobody: no other kernel writes them.

Those are the rows of a sequence that do not count, and the rest of a packed tensor, which goes to
the last sequence.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..arithmetic import maximum, minimum
from ..sequence import RaggedSequences, RaggedSpans

ROWS = 128  # of a block
UNIT = 8  # 16-bit elements that a thread stores at once


@dataclass(frozen=True)
class Gradients:
    """Modes as of BwdTensors; a row is contiguous.  None: it is not wanted."""

    dq: cute.Tensor | None  # (s_q, d, h_q, b)
    dk: cute.Tensor | None  # (s_k, d, h_k, b)
    dv: cute.Tensor | None  # (s_k, dv, h_k, b)


class Clear:
    """One CTA per block of rows of dq, or of dk and dv; most find nothing to do."""

    NUM_THREADS = 128

    @cute.jit
    def __call__(self, gradients: Gradients, sequences: RaggedSequences, stream):
        q_blocks, k_blocks = (
            _blocks_of(spans, x, sequences.count)
            for spans, x in ((sequences.queries, gradients.dq), (sequences.keys, gradients.dk))
        )
        wanted = [x for x in (gradients.dq, gradients.dk) if x is not None]
        entries = maximum(wanted[0].shape[3], wanted[-1].shape[3])
        self.kernel(gradients, sequences, q_blocks).launch(
            grid=(q_blocks + k_blocks, entries, 1), block=(self.NUM_THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, gradients: Gradients, sequences: RaggedSequences, q_blocks: Int32):
        block, entry, _ = cute.arch.block_idx()
        if block < q_blocks:
            self._clear((gradients.dq,), sequences.queries, entry, block)
        else:
            tensors = gradients.dk, gradients.dv
            self._clear(tensors, sequences.keys, entry, block - q_blocks)

    @cute.jit
    def _clear(self, tensors: tuple, spans: RaggedSpans, entry, block):
        if cutlass.const_expr(tensors[0] is not None):
            if entry < tensors[0].shape[3]:
                span, place = spans.block(entry, block, ROWS)
                first = span.start + place * ROWS
                end = minimum(first + ROWS, spans.end_of(span))
                first = maximum(first, span.start + span.length)
                if place >= 0:
                    for x in tensors:
                        self._clear_rows(x[None, None, None, entry], first, end)

    @cute.jit
    def _clear_rows(self, x: cute.Tensor, first, end):
        """Rows first <= row < end of all heads; x (rows, columns, heads)."""
        thread = cute.arch.thread_idx()[0]
        zeros = cute.make_rmem_tensor(UNIT, x.element_type)
        zeros.fill(0.0)
        units = x.shape[1] // UNIT
        of_row = units * x.shape[2]
        for i in cutlass.range(thread, (end - first) * of_row, self.NUM_THREADS, unroll=1):
            row = i // of_row
            rest = i - row * of_row
            head = rest // units
            column = (rest - head * units) * UNIT
            place = cute.domain_offset((first + row, column, head), x).iterator.align(16)
            cute.autovec_copy(zeros, cute.make_tensor(place, cute.make_layout(UNIT)))


def _blocks_of(spans: RaggedSpans, x: cute.Tensor | None, num_sequences) -> Any:
    """Of an entry: see RaggedSpan.first_block."""
    if x is None:
        return Int32(0)
    is_packed = minimum(spans.cu_seqlens.shape[0], 1)
    of_dense = cute.ceil_div(x.shape[0], ROWS)
    return of_dense + is_packed * (x.shape[0] // ROWS + num_sequences - of_dense)
