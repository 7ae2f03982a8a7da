"""The kernel ahead of a backward pass: what it needs of every query, and dQ's sums set to 0.

    delta = rowsum(dO * O) - dlse        lse in base 2

For kernels that subtract delta by a product (BwdConfig.delta_in_parts) it is split into a sum of
three numbers of 16 bits, 8 each, so that nothing of it is lost: one row of a wgmma operand.

Rows that do not exist or see no key get lse = inf and delta = 0, so that their P and dS are 0.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32

from ..bwd_arguments import NUM_PARTS, PARTS, BwdArguments
from ..sequence import RaggedSequences, Sequences
from ..tensors import permute

WARP = 32
CHUNK = 8  # 16-bit elements that a thread loads at once
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class PrepareTensors:
    """The modes of rows first, then heads and batch."""

    out: cute.Tensor  # (s_q, dv, h_q, b)
    dout: cute.Tensor  # (s_q, dv, h_q, b)
    lse: cute.Tensor  # (s_q, h_q, b) fp32
    dlse: cute.Tensor  # (s_q, h_q, b or 0) fp32
    row_stats: cute.Tensor  # (2 * tile_m, m_blocks, h_q, b) fp32
    delta_parts: cute.Tensor | None  # (8 * tile_m, m_blocks, h_q, b) bf16
    dq_sums: cute.Tensor | None  # (tile_m * tile_d, m_blocks, h_q, b) fp32
    dq_counters: cute.Tensor | None  # (n, m_blocks, h_q, b) Int32

    @staticmethod
    def of(x: BwdArguments) -> "PrepareTensors":
        def reversed_modes(workspace):
            return None if workspace is None else permute(workspace, [3, 2, 1, 0])

        out, dout = (permute(t, [1, 3, 2, 0]) for t in (x.out, x.dout))
        lse, dlse = (permute(t, [2, 1, 0]) for t in (x.lse, x.dlse))
        workspace = (
            reversed_modes(t) for t in (x.row_stats, x.delta_parts, x.dq_sums, x.dq_counters)
        )
        return PrepareTensors(out, dout, lse, dlse, *workspace)


class Prepare:
    """One CTA per block of queries of a head; a few neighbouring lanes share a row."""

    NUM_THREADS = 128

    def __init__(self, tile_m: int, head_dim_v: int):
        self.tile_m = tile_m
        chunks = head_dim_v // CHUNK
        self.lanes = 1 << (chunks - 1).bit_length()  # of a row
        self.rows_at_once = self.NUM_THREADS // self.lanes

    @cute.jit
    def __call__(self, tensors: PrepareTensors, sequences: Sequences | RaggedSequences, stream):
        _, m_blocks, heads, batches = tensors.row_stats.shape
        self.kernel(tensors, sequences).launch(
            grid=(m_blocks, heads, batches), block=(self.NUM_THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: PrepareTensors, sequences: Sequences | RaggedSequences):
        thread = cute.arch.thread_idx()[0]
        block, head, entry = cute.arch.block_idx()
        queries, m_block = sequences.query_block(entry, block, self.tile_m)
        s_q, dv = queries.length, tensors.out.shape[1]
        if cutlass.const_expr(isinstance(sequences, RaggedSequences)):
            s_q = cutlass.select_(m_block < 0, Int32(0), s_q)
        out, dout = (queries.matrix(x, head) for x in (tensors.out, tensors.dout))
        lse, stats = queries.vector(tensors.lse, head), tensors.row_stats[None, block, head, entry]
        column = thread % self.lanes * CHUNK
        for i in cutlass.range_constexpr(self.tile_m // self.rows_at_once):
            row = i * self.rows_at_once + thread // self.lanes
            query = m_block * self.tile_m + row
            delta = Float32(0.0)
            if query < s_q and column < dv:
                delta = _dot(out, dout, query, column)
            delta = cute.arch.warp_reduction_sum(delta, threads_in_group=self.lanes)
            log2_sum = Float32.inf
            if query < s_q:
                given = lse[query]
                if given != -Float32.inf:
                    log2_sum = given * LOG2_E
                    if tensors.dlse.shape[2] > 0:
                        delta -= queries.vector(tensors.dlse, head)[query]
                else:
                    delta = Float32(0.0)
            if column == 0:
                stats[row] = log2_sum
                stats[self.tile_m + row] = delta
                self._split(delta, tensors.delta_parts, (block, head, entry), row)
        self._clear(tensors.dq_sums, (block, head, entry), thread)
        if cutlass.const_expr(tensors.dq_counters is not None):
            counters = tensors.dq_counters[None, block, head, entry]
            if thread < cute.size(counters):
                counters[thread] = 0

    def _split(self, number: Float32, parts: cute.Tensor | None, place: tuple, row):
        """number = the sum of the PARTS elements of a row; behind its parts are zeros."""
        if parts is None:
            return
        values = cute.make_rmem_tensor(PARTS, BFloat16)
        values.fill(0.0)
        for i in range(NUM_PARTS):
            values[i] = number.to(BFloat16)
            number -= values[i].to(Float32)
        first = parts[(None, *place)].iterator + PARTS * row
        cute.autovec_copy(values, cute.make_tensor(first.align(16), cute.make_layout(PARTS)))

    def _clear(self, sums: cute.Tensor | None, place: tuple, thread: Int32):
        if sums is None:
            return
        sums = sums[(None, *place)]
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        step = 4 * self.NUM_THREADS
        for i in range(cute.size(sums) // step):
            target = cute.make_tensor(sums.iterator + i * step + 4 * thread, cute.make_layout(4))
            cute.autovec_copy(zeros, target)


def _dot(a: cute.Tensor, b: cute.Tensor, row, column) -> Float32:
    """Of the CHUNK elements of both from (row, column) on."""
    values = []
    for x in (a, b):
        loaded = cute.make_rmem_tensor(CHUNK, x.element_type)
        chunk = cute.domain_offset((row, column), x)
        source = cute.make_tensor(chunk.iterator.align(16), cute.make_layout(CHUNK))
        cute.autovec_copy(source, loaded)
        values.append(loaded)
    products = [Float32(values[0][i]) * Float32(values[1][i]) for i in range(CHUNK)]
    while len(products) > 1:
        products = [x + y for x, y in zip(products[::2], products[1::2], strict=True)]
    return products[0]
