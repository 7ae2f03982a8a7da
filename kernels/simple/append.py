"""The kernel ahead of attention with a cache: new keys and values to their places, rotated.

Row j of sequence i goes to position seqlens[i] + j of its cache, which is in the page
pages[i, position // page_size].  A row that finds no room, or no page, is dropped.  Keys are
rotated on the way (RoFormer, arXiv 2104.09864); queries by a launch of their own, to a new tensor.
Where the cache has bytes, a value becomes the nearest code, which times its scale is the value.
Codes of e4m3 are rotated as the numbers that they are: a head has one scale.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from ..append_signature import CHUNK_BYTES, AppendConfig, AppendSignature
from ..arithmetic import maximum, minimum
from ..elements import ELEMENT
from ..sequence import RaggedSpans
from ..views import four_bytes
from ..widened import widened


@dataclass(frozen=True)
class Rotary:
    """Row p of cos and sin turns what is at position p; beyond their last row, that one."""

    kind: cutlass.Constexpr[str]
    cos: cute.Tensor  # (positions, n / 2)
    sin: cute.Tensor
    first: cute.Tensor  # (b,) Int32: the position of a sequence's first row
    advances: Any  # Int32: 1 if its other rows follow, 0 if all have that position

    def turn(self, row: cute.Tensor, column, values: cute.Tensor, batch, index):
        """values: the chunk of a row from a column on; columns from n on stay as they are."""
        position = self.first[batch] + index * self.advances
        position = minimum(maximum(position, 0), self.cos.shape[0] - 1)
        half = self.cos.shape[1]
        if self.kind == "interleaved":
            self._turn_pairs(position, column // 2, values, column < 2 * half)
        else:
            is_first = column < half
            other = column + cutlass.select_(is_first, half, -half)
            sign = cutlass.select_(is_first, Float32(-1.0), Float32(1.0))
            self._turn_halves(row, position, minimum(column, other), other, sign, values)

    @cute.jit
    def _turn_pairs(self, position, first, values: cute.Tensor, is_turned):
        if is_turned:
            numbers = _numbers(values)
            for i in cutlass.range_constexpr(cute.size(values) // 2):
                cos, sin = self._at(position, first + i)
                x, y = numbers[2 * i], numbers[2 * i + 1]
                numbers[2 * i], numbers[2 * i + 1] = x * cos - y * sin, x * sin + y * cos
            _set(values, numbers)

    @cute.jit
    def _turn_halves(self, row: cute.Tensor, position, first, other, sign, values: cute.Tensor):
        """first: the column of the angle; other: that of what the chunk turns together with."""
        if first < self.cos.shape[1]:
            numbers, others = _numbers(values), _numbers(load_chunk(row, other, cute.size(values)))
            for i in cutlass.range_constexpr(cute.size(values)):
                cos, sin = self._at(position, first + i)
                numbers[i] = numbers[i] * cos + sign * others[i] * sin
            _set(values, numbers)

    def _at(self, position, column) -> tuple[Float32, Float32]:
        return tuple(Float32(x[position, column]) for x in (self.cos, self.sin))


@dataclass(frozen=True)
class Cache:
    """Where the rows of sequences go."""

    tensor: cute.Tensor  # (num_pages, page_size, h, d)
    pages: cute.Tensor  # (b, pages) Int32
    first: cute.Tensor  # (b,) Int32: rows that each sequence has so far
    scales: cute.Tensor | None  # (b, h) fp32: of a value over its code, where the cache has bytes

    @cute.jit
    def store(self, batch, index, head, column, values: cute.Tensor):
        num_pages, page_size, _, _ = self.tensor.shape
        position = self.first[batch] + index
        if position >= 0 and position < self.pages.shape[1] * page_size:
            page = self.pages[batch, position // page_size]
            if page >= 0 and page < num_pages:
                row = self.tensor[page, position % page_size, head, None]
                store_chunk(row, column, self._as_stored(batch, head, values))

    def _as_stored(self, batch, head, values: cute.Tensor) -> cute.Tensor:
        return values if self.scales is None else _narrowed(values, self.scales[batch, head])


@dataclass(frozen=True)
class SameRows:
    """Rows go where they are in another tensor."""

    tensor: cute.Tensor  # (b, s, h, d)
    spans: RaggedSpans

    def store(self, batch, index, head, column, values: cute.Tensor):
        span = self.spans[batch]
        store_chunk(self.tensor[span.entry, span.start + index, head, None], column, values)


class Append:
    """The kernel of one AppendSignature."""

    def __init__(self, signature: AppendSignature, config: AppendConfig):
        self.signature = signature
        self.config = config

    def example_args(self) -> tuple:
        signature = self.signature
        entries, length, heads, pages, page_size = (cute.sym_int32() for _ in range(5))
        d, dv = (cute.sym_int32(divisibility=signature.chunk) for _ in range(2))
        has_bytes = signature.dtype in ("e4m3", "byte")
        element = cutlass.Uint8 if has_bytes else ELEMENT[signature.dtype]

        def tensor(*shape, element=element):
            unit = CHUNK_BYTES * 8 // element.width
            strides = (cute.sym_int64(divisibility=unit) for _ in range(3))
            return make_fake_tensor(element, shape, (*strides, 1), assumed_align=CHUNK_BYTES)

        def numbers():
            return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=4)

        def table(element, *shape):
            alignment = element.width // 8
            return make_fake_tensor(element, shape, (cute.sym_int64(), 1), assumed_align=alignment)

        angles = (None, None, None, None)
        if signature.rotary:
            positions, half = cute.sym_int32(), cute.sym_int32(divisibility=4)
            of_angle = Float32 if has_bytes else element
            cos, sin = (table(of_angle, positions, half) for _ in range(2))
            angles = cos, sin, numbers(), Int32(0)
        places, scales = (None,) * 5, (None, None)
        if signature.appends:
            v = tensor(entries, length, heads, dv)
            caches = tensor(pages, page_size, heads, d), tensor(pages, page_size, heads, dv)
            if signature.narrows:
                caches = (
                    tensor(pages, page_size, heads, x, element=cutlass.Uint8) for x in (d, dv)
                )
                strides = cute.sym_int64(), cute.sym_int64()
                shape = cute.sym_int32(), heads
                scales = (make_fake_tensor(Float32, shape, strides, assumed_align=4),) * 2
            page_table = make_fake_tensor(
                Int32, (cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(), 1), assumed_align=4
            )
            places = v, *caches, page_table, numbers()
        x = tensor(entries, length, heads, d)
        y = None if signature.appends else tensor(entries, length, heads, d)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return x, y, *places, numbers(), Int32(1), *angles, *scales, stream

    @cute.jit
    def __call__(  # noqa: PLR0913
        self,
        x: cute.Tensor,  # (b, s, h, d): k, or q
        y: cute.Tensor | None,  # q rotated
        v: cute.Tensor | None,  # (b, s, h_k, dv)
        k_cache: cute.Tensor | None,  # (num_pages, page_size, h_k, d)
        v_cache: cute.Tensor | None,
        pages: cute.Tensor | None,  # (b, pages) Int32
        seqlens: cute.Tensor | None,  # (b,) Int32
        cu_seqlens: cute.Tensor,  # (b + 1,) Int32 of packed x and v, or (0,)
        num_sequences: Int32,
        cos: cute.Tensor | None,
        sin: cute.Tensor | None,
        first: cute.Tensor | None,  # (b,) Int32
        advances: Int32 | None,
        k_scales: cute.Tensor | None,  # (b, h_k) fp32
        v_scales: cute.Tensor | None,
        stream,
    ):
        all_rows = cute.make_tensor(cu_seqlens.iterator, cute.make_layout((Int32(0),)))
        spans = RaggedSpans(x.shape[1], cu_seqlens, all_rows)
        rotary = None
        if cutlass.const_expr(self.signature.rotary is not None):
            rotary = Rotary(self.signature.rotary, cos, sin, first, advances)
        if cutlass.const_expr(self.signature.appends):
            keys = Cache(k_cache, pages, seqlens, k_scales)
            values = Cache(v_cache, pages, seqlens, v_scales)
            self._launch(x, keys, spans, rotary, num_sequences, stream)
            self._launch(v, values, spans, None, num_sequences, stream)
        else:
            self._launch(x, SameRows(y, spans), spans, rotary, num_sequences, stream)

    def _launch(self, x, target, spans, rotary, num_sequences, stream):
        _, length, heads, d = x.shape
        chunks = length * heads * (d // self.signature.chunk)
        num_ctas = minimum(
            cute.ceil_div(chunks, self.config.num_threads), self.config.ctas_per_sequence
        )
        self.kernel(x, target, spans, rotary).launch(
            grid=(num_ctas, num_sequences, 1),
            block=(self.config.num_threads, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        target: Cache | SameRows,
        spans: RaggedSpans,
        rotary: Rotary | None,
    ):
        thread, _, _ = cute.arch.thread_idx()
        cta, batch, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        size = self.signature.chunk
        span = spans[batch]
        heads, chunks = x.shape[2], x.shape[3] // size
        first, step = cta * self.config.num_threads + thread, num_ctas * self.config.num_threads
        for i in cutlass.range(first, span.length * heads * chunks, step, unroll=1):
            index = i // (heads * chunks)
            head = i // chunks - index * heads
            column = i % chunks * size
            row = x[span.entry, span.start + index, head, None]
            values = load_chunk(row, column, size)
            if cutlass.const_expr(rotary is not None):
                rotary.turn(row, column, values, batch, index)
            target.store(batch, index, head, column, values)


def load_chunk(row: cute.Tensor, column, size: int) -> cute.Tensor:
    values = cute.make_rmem_tensor(size, row.element_type)
    cute.autovec_copy(_chunk(row, column, size), values)
    return values


def store_chunk(row: cute.Tensor, column, values: cute.Tensor):
    cute.autovec_copy(values, _chunk(row, column, cute.size(values)))


def _narrowed(values: cute.Tensor, scale: Float32) -> cute.Tensor:
    """The codes of values, as bytes."""
    codes = cute.make_rmem_tensor(cute.size(values), cutlass.Uint8)
    _set(codes, [x / scale for x in _numbers(values)])
    return codes


def _numbers(values: cute.Tensor) -> list[Float32]:
    """Of 16-bit registers, or of codes of e4m3."""
    if values.element_type is cutlass.Uint8:
        values = widened(values, cutlass.Float16)
    return [Float32(values[i]) for i in range(cute.size(values))]


def _set(values: cute.Tensor, numbers: list[Float32]):
    """The other way, rounded."""
    if values.element_type is not cutlass.Uint8:
        for i, x in enumerate(numbers):
            values[i] = x.to(values.element_type)
        return
    words = cute.recast_tensor(values, Int32)
    for i in range(cute.size(words)):
        words[i] = four_bytes(*numbers[4 * i : 4 * i + 4], "e4m3")


def _chunk(row: cute.Tensor, column, size: int) -> cute.Tensor:
    alignment = size * row.element_type.width // 8
    return cute.make_tensor((row.iterator + column).align(alignment), cute.make_layout(size))
