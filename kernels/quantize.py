"""16-bit rows -> one byte per element and a scale per block of rows, in one pass over memory.

One CTA per block of rows of a head. A thread holds 16 columns of a few rows in registers, from the
loads (two of 16 bytes per row) to the store (one of 16 bytes); lanes that share a row are
neighbours. Threads past the last row, and lanes past the last column, do again what the last one
does, to the same addresses: that changes no maximum and saves all conditions. Heads are innermost
in the grid, as they are in memory.

Of sequences with lengths of their own, blocks begin at the first row of each, and no two share one.
A packed tensor may have more blocks than its sequences need: those get neutral scales and sums, and
rows that belong to no sequence are neither read nor written.
"""

import functools
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from .arithmetic import minimum
from .quantize_signature import (
    CHUNK,
    LARGEST,
    LARGEST_FLOAT,
    SMALLEST_DESCALE,
    QuantizeConfig,
    QuantizeSignature,
    sign_of,
)
from .sequence import RaggedSpans
from .views import four_bytes

ELEMENT = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}
WARP = 32


@dataclass(frozen=True)
class QuantizeTensors:
    """Those of Quantize.__call__ that are there."""

    x: cute.Tensor
    y: cute.Tensor | None
    scales: cute.Tensor
    mean: cute.Tensor | None
    dot: cute.Tensor | None
    errors: cute.Tensor | None


@dataclass(frozen=True)
class Block:
    """Some rows of a head of a sequence."""

    entry: Any  # of the tensors that have rows or blocks
    batch: Any  # index of the sequence
    head: Any
    index: Any  # among all blocks of the entry
    first_row: Any  # in the tensor
    end: Any  # after the last row of the sequence


class Quantize:
    """The quantisation kernel of one QuantizeSignature."""

    def __init__(self, signature: QuantizeSignature, config: QuantizeConfig):
        self.signature = signature
        self.lanes = signature.lanes
        self.num_threads = config.num_threads(signature)
        self.ctas_per_sm = config.ctas_per_sm(signature)
        self.num_chunks = signature.head_dim // CHUNK
        self.num_rows = config.rows_per_thread(signature)  # of a thread
        self.row_step = self.num_threads // self.lanes  # from one to the next

    def example_args(self) -> tuple:
        """Symbolic arguments of __call__; None for those that the signature does not use."""
        signature, d = self.signature, self.signature.head_dim
        entries, length, heads, heads_kv, blocks = (cute.sym_int32() for _ in range(5))
        batch = cute.sym_int32() if signature.is_ragged else entries

        def tensor(element, shape, unit=1):
            strides = tuple(cute.sym_int64(divisibility=unit) for _ in shape[1:])
            alignment = unit * element.width // 8
            return make_fake_tensor(element, shape, (*strides, 1), assumed_align=alignment)

        def numbers():
            return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=4)

        x = tensor(ELEMENT[signature.dtype], (entries, length, heads, d), 8)
        y = tensor(cutlass.Uint8, (entries, length, heads, d), 16)
        scales = {
            "block": lambda: tensor(Float32, (entries, heads, blocks)),
            "given": lambda: tensor(Float32, (batch, heads, d), 4),
            "amax": lambda: tensor(Float32, (entries, heads, blocks, d), 4),
            "sum": lambda: tensor(Float32, (entries, heads, blocks, d), 4),
        }[signature.scales]()
        return (
            x,
            y if signature.has_codes else None,
            scales,
            tensor(Float32, (batch, heads_kv, d), 4) if signature.has_mean else None,
            tensor(Float32, (entries, heads, length)) if signature.dot_with_mean else None,
            tensor(Float32, (entries, heads, blocks, d), 4) if signature.sum_errors else None,
            *((numbers(), numbers(), Int32(1)) if signature.is_ragged else (None, None, None)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (b, s, h, d)
        mY: cute.Tensor | None,  # (b, s, h, d) bytes, out
        mScales: cute.Tensor,  # block: (b, h, n) out; given: (b, h, d); else: (b, h, n, d) out
        mMean: cute.Tensor | None,  # (b, h_k, d), h_k divides h
        mDot: cute.Tensor | None,  # (b, h, s) out
        mErrors: cute.Tensor | None,  # (b, h, n, d) out, in units of codes
        cu_seqlens: cute.Tensor | None,  # of ragged sequences, as in RaggedSpans; where packed, b
        seqused: cute.Tensor | None,  # is 1 above, but for mMean and given scales
        num_blocks: Int32 | None,  # n
        stream,
    ):
        entries, length, heads, _ = mX.shape
        spans = None
        if cutlass.const_expr(self.signature.is_ragged):
            spans = RaggedSpans(length, cu_seqlens, seqused)
        else:
            num_blocks = cute.ceil_div(length, self.signature.rows)
        group = heads // mMean.shape[1] if cutlass.const_expr(mMean is not None) else 1
        grid = (heads * num_blocks * entries, 1, 1)
        divisors = tuple(cute.FastDivmodDivisorV2(Int32(n)) for n in (heads, num_blocks, group))
        tensors = QuantizeTensors(mX, mY, mScales, mMean, mDot, mErrors)
        self.kernel(tensors, spans, divisors).launch(
            grid=grid,
            block=(self.num_threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=self.ctas_per_sm,
            preferred_smem_carveout=50,  # percent; or the DSL asks the driver, if there is one
        )

    @cute.kernel
    def kernel(
        self,
        tensors: QuantizeTensors,
        spans: RaggedSpans | None,
        divisors: tuple,  # heads, blocks of a head, query heads per mean
    ):
        rows = self.signature.rows
        index, _, _ = cute.arch.block_idx()
        index, head = divmod(index, divisors[0])
        entry, index = divmod(index, divisors[1])
        thread, _, _ = cute.arch.thread_idx()
        if cutlass.const_expr(spans is None):
            block = Block(entry, entry, head, index, index * rows, tensors.x.shape[1])
            self._quantize(tensors, block, divisors[2], thread)
        else:
            batch = spans.batch_of(entry, index, rows)
            span = spans[batch]
            first_row = (index - span.first_block(rows)) * rows  # of the sequence
            if first_row >= 0 and first_row < span.length:
                start, end = span.start + first_row, span.start + span.length
                block = Block(entry, batch, head, index, start, end)
                self._quantize(tensors, block, divisors[2], thread)
            else:
                self._clear_block(tensors, entry, head, index, thread)

    def _quantize(self, tensors: QuantizeTensors, block: Block, group, thread):
        signature = self.signature
        entry, head, index = block.entry, block.head, block.index
        lane = thread % self.lanes
        column = minimum(lane, self.num_chunks - 1)
        first_row, last_row = block.first_row + thread // self.lanes, block.end - 1
        rows = [minimum(first_row + i * self.row_step, last_row) for i in range(self.num_rows)]
        x, factor = self._values(tensors, block, group, rows, lane)
        if signature.scales == "amax":
            columns = zip(*x, strict=True)
            peaks = [_maximum([abs(a) for a in column]) * abs(factor) for column in columns]
            self._write_by_column(tensors.scales[entry, head, index, None], peaks, _maximum, thread)
        elif signature.scales == "sum":
            sums = self._sum_rows(x, last_row + 1 - first_row)
            self._write_by_column(tensors.scales[entry, head, index, None], sums, _sum, thread)
        else:
            if signature.scales == "given":
                scales = _elements(_load(tensors.scales[block.batch, head, None], column))
                factors = [factor * f for f in scales]
            else:
                descale = self._descale(self._peak(x, thread) * abs(factor))
                tensors.scales[entry, head, index] = descale
                factors = [factor * cute.arch.rcp_approx(descale)] * CHUNK
            x = [[a * f for a, f in zip(chunk, factors, strict=True)] for chunk in x]
            codes = [_codes(chunk, signature.out) for chunk in x]
            for row, chunk in zip(rows, codes, strict=True):
                _store(tensors.y[entry, row, head, None], column, chunk)
            if signature.sum_errors:
                errors = self._sum_errors(x, codes, last_row + 1 - first_row)
                target = tensors.errors[entry, head, index, None]
                self._write_by_column(target, errors, _sum, thread)

    def _values(self, tensors: QuantizeTensors, block: Block, group, rows: list, lane) -> tuple:
        """What is to be quantised, but for a factor that is returned too."""
        signature = self.signature
        entry, head = block.entry, block.head
        column = minimum(lane, self.num_chunks - 1)
        x = [_load(tensors.x[entry, row, head, None], column) for row in rows]
        x = [_to_float(chunk) for chunk in x]
        if signature.has_mean:
            mean = _elements(_load(tensors.mean[block.batch, head // group, None], column))
            if signature.dot_with_mean:
                for chunk, row in zip(x, rows, strict=True):
                    tensors.dot[entry, head, row] = self._dot(chunk, mean, lane)
            if signature.subtract_mean:
                x = [[a - b for a, b in zip(chunk, mean, strict=True)] for chunk in x]
        factor = Float32(1.0)  # of x, still to be applied
        if signature.hadamard:
            x, factor = self._rotate(x, lane)
        return x, factor

    @cute.jit
    def _clear_block(self, tensors: QuantizeTensors, entry, head, index, thread):
        """A block without rows: a descale of 1, peaks and sums of 0."""
        signature = self.signature
        if cutlass.const_expr(signature.scales == "block"):
            tensors.scales[entry, head, index] = Float32(1.0)
        if cutlass.const_expr(not signature.has_codes):
            self._clear(tensors.scales[entry, head, index, None], thread)
        if cutlass.const_expr(signature.sum_errors):
            self._clear(tensors.errors[entry, head, index, None], thread)

    @cute.jit
    def _clear(self, target: cute.Tensor, thread):
        for i in range(thread, self.signature.head_dim, self.num_threads):
            target[i] = Float32(0.0)

    @cute.jit
    def _dot(self, chunk: list, mean: list, lane) -> Float32:
        """Of a whole row, in all of its lanes."""
        total = sum(a * b for a, b in zip(chunk, mean, strict=True))
        if lane >= self.num_chunks:
            total = Float32(0.0)
        return cute.arch.warp_reduction_sum(total, threads_in_group=self.lanes)

    def _rotate(self, x: list, lane) -> tuple[list, Float32]:
        """Signs and Walsh-Hadamard transform of the rows, but for a factor that is returned too.

        sign_of is a product over pairs of bits: of a sign for the column in a chunk, which costs
        nothing as it is known, and one for the lane. That is left for the caller to multiply by.
        """
        x = [[a if sign_of(i) > 0 else -a for i, a in enumerate(chunk)] for chunk in x]
        for step in (1, 2, 4, 8):
            x = [
                [b - a if i & step else a + b for i, (a, b) in enumerate(_pairs(chunk, step))]
                for chunk in x
            ]
        pairs = lane & (lane >> 1)
        sign = _sign(pairs ^ (pairs >> 2))
        for bit in range(self.lanes.bit_length() - 1):
            other = cute.arch.shuffle_sync_bfly(sign, offset=1 << bit)
            own = _sign(lane >> bit) * sign * other
            x = [
                [cute.arch.shuffle_sync_bfly(a, offset=1 << bit) + own * a for a in chunk]
                for chunk in x
            ]
            sign = other
        return x, sign * self.signature.head_dim**-0.5

    @cute.jit
    def _descale(self, peak: Float32) -> Float32:
        descale = cute.arch.fmin(peak, LARGEST_FLOAT) * (1.0 / LARGEST[self.signature.out])
        descale = cute.arch.fmax(descale, SMALLEST_DESCALE)
        if peak == 0.0:
            descale = Float32(1.0)
        return descale

    def _peak(self, x: list, thread) -> Float32:
        """Largest magnitude of the block, in all threads."""
        peak = Float32(0.0)
        for a in (a for chunk in x for a in chunk):
            peak = cute.arch.fmax(peak, abs(a))
        peak = cute.arch.warp_reduction_max(peak)
        num_warps = self.num_threads // WARP
        peaks = _shared((num_warps,))
        peaks[thread // WARP] = peak  # by all lanes alike
        cute.arch.sync_threads()
        for warp in range(num_warps):
            peak = cute.arch.fmax(peak, peaks[warp])
        return peak

    def _sum_rows(self, x: list, rows_left) -> list:
        """Of each column, but for what repeats the last row."""
        sums = [Float32(0.0)] * CHUNK
        for i, chunk in enumerate(x):
            is_row = i * self.row_step < rows_left
            kept = [cutlass.select_(is_row, a, Float32(0.0)) for a in chunk]
            sums = [a + b for a, b in zip(sums, kept, strict=True)]
        return sums

    def _sum_errors(self, x: list, codes: list, rows_left) -> list:
        """Of each column x - codes, but for what is not finite or repeats the last row."""
        errors = [Float32(0.0)] * CHUNK
        for i, (chunk, words) in enumerate(zip(x, codes, strict=True)):
            is_row = i * self.row_step < rows_left
            bound = cutlass.select_(is_row, Float32(LARGEST_FLOAT), Float32(-1.0))
            lacking = [
                a - b for a, b in zip(chunk, _decode(words, self.signature.out), strict=True)
            ]
            kept = [cutlass.select_(abs(e) <= bound, e, Float32(0.0)) for e in lacking]
            errors = [a + b for a, b in zip(errors, kept, strict=True)]
        return errors

    @cute.jit
    def _write_by_column(self, target: cute.Tensor, values: list, combine, thread):
        """What `combine` makes of the values that threads have for each column, to target (d,)."""
        column = minimum(thread % self.lanes, self.num_chunks - 1)
        parts = _shared((self.row_step, self.signature.head_dim))
        for i in cutlass.range_constexpr(CHUNK):
            parts[thread // self.lanes, column * CHUNK + i] = values[i]
        cute.arch.sync_threads()
        for i in range(thread, self.signature.head_dim, self.num_threads):
            total = Float32(0.0)
            for row in range(self.row_step):
                total = combine([total, parts[row, i]])
            target[i] = total


def _sum(values: list) -> Float32:
    return sum(values)


def _maximum(values: list) -> Float32:
    """Of numbers from 0 on; NaN is none."""
    return functools.reduce(cute.arch.fmax, values, Float32(0.0))


def _sign(number) -> Float32:
    """1 for even, -1 for odd."""
    return (1 - 2 * (number & 1)).to(Float32)


def _pairs(chunk: list, step: int) -> list:
    """Each element with the one whose index differs in one bit."""
    return [(a, chunk[i ^ step]) for i, a in enumerate(chunk)]


def _elements(fragment: cute.Tensor) -> list:
    return [fragment[i] for i in range(cute.size(fragment))]


def _to_float(chunk: cute.Tensor) -> list:
    """16-bit -> fp32; inf -> NaN, which no maximum sees."""
    is_bf16 = chunk.element_type is cutlass.BFloat16
    kind = "bf16" if is_bf16 else "f16"
    zero_times = (
        f"{{ .reg .b32 zero; mov.b32 zero, 0; fma.rn.{kind}x2 {{$w0}}, {{$r0}}, zero, {{$r0}}; }}"
    )
    words = cute.recast_tensor(chunk, Int32)
    for i in range(cute.size(words)):
        words[i] = cute.arch.inline_ptx(
            zero_times, write_only_types=[Int32], read_only_args=[words[i]]
        )
    if not is_bf16:
        return [a.to(Float32) for a in _elements(chunk)]
    bits = [half for word in _elements(words) for half in (word << 16, word & -65536)]
    return [a.bitcast(Float32) for a in bits]


def _load(row: cute.Tensor, column) -> cute.Tensor:
    """Chunk `column` of a row (d,) in registers."""
    chunk = cute.local_tile(row, (CHUNK,), (column,))
    fragment = cute.make_rmem_tensor(CHUNK, row.element_type)
    cute.autovec_copy(chunk, fragment)
    return fragment


def _codes(values: list, out: str) -> cute.Tensor:
    """A chunk of fp32 -> bytes, four in a register."""
    words = cute.make_rmem_tensor(CHUNK // 4, Int32)
    for i in range(CHUNK // 4):
        words[i] = _convert(values[4 * i : 4 * i + 4], out)
    return words


def _store(row: cute.Tensor, column, codes: cute.Tensor):
    """Chunk `column` of a row (d,) of bytes."""
    chunk = cute.local_tile(row, (CHUNK,), (column,))
    cute.autovec_copy(cute.recast_tensor(codes, row.element_type), chunk)


def _decode(codes: cute.Tensor, out: str) -> list:
    """FP8 bytes, four in a register -> fp32."""
    to_float = (
        "{{ .reg .b16 low, high; .reg .b32 pair; mov.b32 {{low, high}}, {{$r0}};"
        " cvt.rn.f16x2.{out}x2 pair, {half}; mov.b32 {{low, high}}, pair;"
        " cvt.f32.f16 {{$w0}}, low; cvt.f32.f16 {{$w1}}, high; }}"
    )
    return [
        a
        for word in _elements(codes)
        for half in ("low", "high")
        for a in cute.arch.inline_ptx(
            to_float.format(out=out, half=half),
            write_only_types=[Float32, Float32],
            read_only_args=[word],
        )
    ]


def _convert(values: list, out: str) -> Int32:
    """Four fp32 -> four codes, to nearest even, saturating; NaN -> 0 in int8."""
    if out == "int8":
        convert = "cvt.rni.s32.f32 {$w0}, {$r0};"
        a, b, c, d = (
            cute.arch.inline_ptx(convert, write_only_types=[Int32], read_only_args=[value])
            for value in values
        )
        low, high = (Int32(cute.arch.prmt(*pair, 0x0040)) for pair in ((a, b), (c, d)))
        return Int32(cute.arch.prmt(low, high, 0x5410))
    return four_bytes(*values, out)


def _shared(shape: tuple) -> cute.Tensor:
    layout = cute.make_layout(shape, stride=(shape[-1], 1)[-len(shape) :])
    return SmemAllocator().allocate_tensor(Float32, layout, byte_alignment=16)
