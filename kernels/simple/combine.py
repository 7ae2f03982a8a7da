"""Combine: the results over parts of the keys -> those over all keys.

    lse = log(sum_i exp(lse_i))        out = sum_i exp(lse_i - lse) out_i

in fp32, parts in their order, so that the same parts give the same bits.  A part whose lse is -inf
has seen no key, and its out does not count.  A thread makes four columns of a row of a head; rows
that no sequence has are left as they are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from ..arithmetic import ceil_div, maximum, minimum
from ..elements import ELEMENT
from ..sequence import RaggedSpans

CHUNK = 4  # columns of a thread: a load of 16 bytes per part
THREADS = 128
CTAS_PER_SM = 8  # leaves registers to load side by side
AT_ONCE = 4  # parts that are loaded side by side
LN2 = math.log(2.0)
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class CombineSignature:
    out: Literal["bf16", "fp16", "fp32"]
    is_ragged: bool = False  # rows belong to sequences with lengths of their own


@dataclass(frozen=True)
class CombineTensors:
    parts: cute.Tensor  # (n, b, s, h, dv) fp32
    part_lse: cute.Tensor  # (n, b, s, h) fp32
    out: cute.Tensor  # (b, s, h, dv)
    lse: cute.Tensor  # (b, s, h) fp32
    rows: RaggedSpans | None


class Combine:
    """The kernel of one CombineSignature."""

    def __init__(self, signature: CombineSignature, config: None = None):
        self.signature = signature

    def example_args(self) -> tuple:
        """Symbolic arguments of __call__."""
        n, b, s, h = (cute.sym_int32() for _ in range(4))
        dv = cute.sym_int32(divisibility=CHUNK)

        def tensor(dtype, shape, unit):
            strides = tuple(cute.sym_int64(divisibility=unit) for _ in shape[1:])
            alignment = unit * dtype.width // 8
            return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=alignment)

        def scalars(shape):
            strides = tuple(cute.sym_int64() for _ in shape)
            return make_fake_tensor(Float32, shape, strides, assumed_align=4)

        def numbers():
            return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=4)

        return (
            tensor(Float32, (n, b, s, h, dv), CHUNK),
            scalars((n, b, s, h)),
            tensor(ELEMENT[self.signature.out], (b, s, h, dv), CHUNK),
            scalars((b, s, h)),
            *((numbers(), numbers()) if self.signature.is_ragged else (None, None)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(self, parts, part_lse, out, lse, cu_seqlens, seqused, stream):  # noqa: PLR0913
        _, b, s, h, dv = parts.shape
        rows = RaggedSpans(s, cu_seqlens, seqused) if self.signature.is_ragged else None
        per_row = h * (dv // CHUNK)  # threads
        rows_at_once = maximum(THREADS // per_row, 1)
        self.kernel(CombineTensors(parts, part_lse, out, lse, rows), per_row, rows_at_once).launch(
            grid=(ceil_div(b * s, rows_at_once), ceil_div(per_row, THREADS), 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=CTAS_PER_SM,
            preferred_smem_carveout=0,  # it needs none
        )

    @cute.kernel
    def kernel(self, tensors: CombineTensors, per_row: Int32, rows_at_once: Int32):
        block, part_of_row, _ = cute.arch.block_idx()
        index = part_of_row * THREADS + cute.arch.thread_idx()[0]
        row_of_block = index // per_row
        place = index - row_of_block * per_row
        row = block * rows_at_once + row_of_block
        num_entries, s, _, dv = tensors.out.shape
        chunks = dv // CHUNK
        head = place // chunks
        entry = row // s
        query = row - entry * s
        exists = row_of_block < rows_at_once and entry < num_entries
        if exists:
            if cutlass.const_expr(tensors.rows is not None):
                exists = tensors.rows.holds(entry, query)
            if exists:
                _combine(tensors, entry, query, head, (place - head * chunks) * CHUNK)


@cute.jit
def _combine(tensors: CombineTensors, entry, query, head, column):
    """Four columns of a row of a head; the thread of the first ones writes lse."""
    parts = tensors.parts[None, entry, query, head, None]
    part_lse = tensors.part_lse[None, entry, query, head]
    num_parts = part_lse.shape[0]
    top = -Float32.inf
    for first in cutlass.range(0, num_parts, AT_ONCE, unroll=1):
        for lse in _load_lse(part_lse, first):
            top = cute.arch.fmax(top, lse)
    total = Float32(0.0)
    sums = cute.make_rmem_tensor(CHUNK, Float32)
    sums.fill(0.0)
    for first in cutlass.range(0, num_parts, AT_ONCE, unroll=1):
        given = _load_lse(part_lse, first)
        loaded = _load_parts(parts, given, first, column)
        for lse, values in zip(given, loaded, strict=True):
            weight = cute.math.exp2((lse - top) * LOG2_E, fastmath=True)
            weight = cutlass.select_(lse == top, Float32(1.0), weight)  # of infinite ones, too
            is_empty = lse == -Float32.inf
            weight = cutlass.select_(is_empty, Float32(0.0), weight)
            for j in range(CHUNK):
                sums[j] += weight * cutlass.select_(is_empty, Float32(0.0), values[j])
            total += weight
    factor = 1.0 / cutlass.select_(total == 0.0, Float32(1.0), total)
    out = tensors.out[entry, query, head, None]
    results = cute.make_rmem_tensor(CHUNK, out.element_type)
    for j in cutlass.range_constexpr(CHUNK):
        results[j] = (sums[j] * factor).to(out.element_type)
    cute.autovec_copy(results, _chunk(out, column))
    if column == 0:
        lse = top + cute.math.log2(total, fastmath=True) * LN2
        tensors.lse[entry, query, head] = lse


def _load_lse(part_lse: cute.Tensor, first) -> list[Float32]:
    """Of AT_ONCE parts; those beyond the last one are empty."""
    last = part_lse.shape[0] - 1
    given = [part_lse[minimum(first + i, last)] for i in range(AT_ONCE)]
    return [cutlass.select_(first + i <= last, lse, -Float32.inf) for i, lse in enumerate(given)]


def _load_parts(parts: cute.Tensor, given: list, first, column) -> list[cute.Tensor]:
    """Side by side. In place of an empty part the first is read, whose memory is read anyway."""
    loaded = []
    for i, lse in enumerate(given):
        index = cutlass.select_(lse == -Float32.inf, Int32(0), first + i)
        loaded.append(cute.make_rmem_tensor(CHUNK, Float32))
        cute.autovec_copy(_chunk(parts[index, None], column), loaded[-1])
    return loaded


def _chunk(row: cute.Tensor, column) -> cute.Tensor:
    """The CHUNK elements from a column on, which are loaded or stored at once."""
    first = cute.domain_offset((column,), row).iterator
    alignment = CHUNK * row.element_type.width // 8
    return cute.make_tensor(first.align(alignment), cute.make_layout(CHUNK))
