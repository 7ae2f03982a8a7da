"""Sequence: one entry of the batch, the only owner of its lengths and of where its rows lie.

Dense tensors have a mode for the batch, and every entry has all of its rows.  Ragged sequences have
lengths that live on the device: they follow each other in a packed tensor, or are the first rows
of the entries of a dense one.

TMA must not carry rows of a neighbour into a tile, nor rows of a tile into a neighbour.  It only
knows the bounds of a tensor, so a ragged tensor of n rows is shown to it with one mode more:

    element (i, e) of the modes (rows, ends) is row i + e - n          0 <= i < n, 0 <= e <= n

A sequence whose rows end before row e is the slice e: its rows are the last ones of the mode of
rows, and what follows them is out of bounds, so that it loads as zeros and is not stored.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int64

from .arithmetic import ceil_div, clamp, maximum, minimum
from .blocks import Window
from .signature import MaskKind


@dataclass(frozen=True)
class Span:
    """The queries or the keys of a sequence: all rows of an entry of a dense tensor."""

    entry: Any  # index of the batch
    length: Any

    start = 0  # its first row in the tensor

    def first_block(self, num_rows: int) -> int:
        """In a workspace, of an entry: see RaggedSpan.first_block."""
        return 0

    def tiled(self, tensor: cute.Tensor, head, row_mode: int) -> cute.Tensor:
        """TMA's (rows, columns, heads, b) -> (rows, columns) of a head; columns may come first."""
        return tensor[None, None, head, self.entry]

    def matrix(self, tensor: cute.Tensor, head) -> cute.Tensor:
        """(rows, columns, heads, b) -> (rows, columns) of a head, in memory."""
        return tensor[None, None, head, self.entry]

    def vector(self, tensor: cute.Tensor, head) -> cute.Tensor:
        """(rows, heads, b) -> (rows,) of a head."""
        return tensor[None, head, self.entry]

    def blocks(self, tensor: cute.Tensor, head, num_rows: int) -> cute.Tensor:
        """(blocks, heads, b) -> (blocks,) of a head: of `num_rows` each, or one of all rows."""
        return tensor[None, head, self.entry]

    def workspace(self, tensor: cute.Tensor, head, num_rows: int) -> cute.Tensor:
        """(numbers, blocks, heads, b) -> (numbers, blocks) of a head: blocks of `num_rows` rows."""
        return tensor[None, None, head, self.entry]

    def uniform(self) -> "Span":
        return replace(self, entry=cute.arch.make_warp_uniform(self.entry))


@dataclass(frozen=True)
class RaggedSpan:
    """The same of a ragged sequence: some of the rows of a tensor."""

    batch: Any  # index of the sequence
    entry: Any  # the same in a dense tensor, 0 in a packed one
    start: Any
    length: Any
    num_rows: Any  # of the tensor

    def tiled(self, tensor: cute.Tensor, head, row_mode: int) -> cute.Tensor:
        """(rows, columns, heads, b, ends) -> (rows, columns) of a head; columns may come first."""
        matrix = tensor[None, None, head, self.entry, self.start + self.length]
        first = self.num_rows - self.length
        return cute.domain_offset((first, 0) if row_mode == 0 else (0, first), matrix)

    def matrix(self, tensor: cute.Tensor, head) -> cute.Tensor:
        return cute.domain_offset((self.start, 0), tensor[None, None, head, self.entry])

    def vector(self, tensor: cute.Tensor, head) -> cute.Tensor:
        return cute.domain_offset((self.start,), tensor[None, head, self.entry])

    def blocks(self, tensor: cute.Tensor, head, num_rows: int) -> cute.Tensor:
        """In a packed tensor no two sequences share a block: see `first_block`."""
        count, _, entries = tensor.shape
        vector = tensor[None, head, minimum(self.batch, entries - 1)]
        first = minimum(self.first_block(num_rows), count - 1)
        own = clamp(ceil_div(self.length, num_rows), 1, count - first)
        vector = cute.domain_offset((first,), vector)
        return cute.make_tensor(vector.iterator, cute.make_layout((own,), stride=vector.stride))

    def workspace(self, tensor: cute.Tensor, head, num_rows: int) -> cute.Tensor:
        """See `first_block`."""
        first = (0, self.first_block(num_rows))
        return cute.domain_offset(first, tensor[None, None, head, self.entry])

    def first_block(self, num_rows: int):
        """Of a packed tensor of n rows in n // num_rows + b blocks, which is enough for all."""
        return self.start // num_rows + self.batch - self.entry

    def uniform(self) -> "RaggedSpan":
        uniform = cute.arch.make_warp_uniform
        numbers = ("batch", "entry", "start", "length")
        return replace(self, **{name: uniform(getattr(self, name)) for name in numbers})


@dataclass(frozen=True)
class PagedSpan:
    """The keys of a sequence in pages: position p is row p % page_size of an entry of k and of v.

    Which entry that is stands in the table: pages[batch, p // page_size].
    """

    batch: Any
    start: Any  # the position of the first key
    length: Any
    page_size: Any
    pages: cute.Tensor  # (b, pages) Int32
    rows_at_once: cutlass.Constexpr[
        int
    ]  # divides page_size: so many neighbouring keys share a page

    @cute.jit
    def entry_of(self, key):
        """The page of a key; any for one beyond the last, whose place in the table is not read."""
        entry = cutlass.Int32(0)
        if key < self.length:
            entry = self.pages[self.batch, (self.start + key) // self.page_size]
        return entry

    @cute.jit
    def address_of(self, tensor: cute.Tensor, head, key):
        """Of a key's row of (rows, columns, heads, pages); 0 if it is none, or its page is none."""
        address = cutlass.Int64(0)
        if key < self.length:
            position = self.start + key
            page = self.pages[self.batch, position // self.page_size]
            if page >= 0 and page < tensor.shape[3]:
                place = cute.crd2idx((position % self.page_size, 0, head, page), tensor.layout)
                address = (tensor.iterator + place).toint()
        return address

    def tiled(self, tensor: cute.Tensor, head, row_mode: int, key, entry) -> cute.Tensor:
        """(rows, columns, heads, pages, ends) -> (rows, columns) of a head, from a key on.

        Columns may come first.  entry: entry_of(key).  Rows from the sequence's end on are out of
        bounds, and so are those of a page that does not exist.
        """
        position = self.start + key
        first = position // self.page_size * self.page_size
        used = clamp(self.start + self.length - first, 0, self.page_size)
        row = position - first
        rest = RaggedSpan(self.batch, entry, row, used - row, self.page_size)
        return rest.tiled(tensor, head, row_mode)

    def blocks(self, tensor: cute.Tensor, head, num_rows: int) -> cute.Tensor:
        """(blocks, heads, b) -> (blocks,) of a head, by the positions of the keys."""
        return tensor[None, head, self.batch]

    def uniform(self) -> "PagedSpan":
        uniform = cute.arch.make_warp_uniform
        numbers = ("batch", "start", "length")
        return replace(self, **{name: uniform(getattr(self, name)) for name in numbers})


@dataclass(frozen=True)
class Sequence:
    """The queries and keys that attend to each other."""

    batch: Any
    queries: Span | RaggedSpan
    keys: Span | RaggedSpan | PagedSpan

    @property
    def s_q(self):
        return self.queries.length

    @property
    def s_k(self):
        return self.keys.length

    def vector(self, tensor: cute.Tensor, head) -> cute.Tensor:
        """(n, heads, b) -> (n,) of a head, where all rows have the same."""
        return tensor[None, head, self.batch]

    def window(self, kind: MaskKind, left, right, rows_per_query=None) -> Window:
        may_lack_keys = not isinstance(self.keys, Span)
        return Window(kind, self.s_q, self.s_k, left, right, may_lack_keys, rows_per_query)

    def hiding_keys(self, are_hidden) -> "Sequence":
        """The same, as if it were without keys where `are_hidden`."""
        length = cutlass.select_(are_hidden, cutlass.Int32(0), self.s_k)
        return replace(self, keys=replace(self.keys, length=length))

    def uniform(self) -> "Sequence":
        """With its numbers in uniform registers again, which values carried by a loop have left."""
        batch = cute.arch.make_warp_uniform(self.batch)
        return Sequence(batch, self.queries.uniform(), self.keys.uniform())


@dataclass(frozen=True)
class Sequences:
    """All of a call with dense tensors: they have one length."""

    s_q: Any
    s_k: Any

    def __getitem__(self, batch) -> Sequence:
        return Sequence(batch, Span(batch, self.s_q), Span(batch, self.s_k))

    def query_block(self, entry, block, num_rows: int) -> tuple[Span, Any]:
        """The sequence that block `block` of a workspace of queries belongs to, and which it is."""
        return Span(entry, self.s_q), block


@dataclass(frozen=True)
class RaggedSpans:
    """Where the sequences lie in the tensors of queries or of keys."""

    num_rows: Any  # of the tensor: all rows of a packed one, of an entry of a dense one
    cu_seqlens: cute.Tensor  # (b + 1,) Int32 for packed tensors: rows before a sequence; or (0,)
    seqused: cute.Tensor  # (b,) Int32: how many of a sequence's rows count; or (0,) for all

    @cute.jit
    def __getitem__(self, batch) -> RaggedSpan:
        """Lengths that the tensor cannot have are cut to what it has."""
        entry, start, end = batch, cutlass.Int32(0), self.num_rows
        if self.cu_seqlens.shape[0] > 0:
            entry = cutlass.Int32(0)
            start = clamp(self.cu_seqlens[batch], 0, self.num_rows)
            end = clamp(self.cu_seqlens[batch + 1], start, self.num_rows)
        length = end - start
        if self.seqused.shape[0] > 0:
            length = minimum(length, maximum(self.seqused[batch], 0))
        return RaggedSpan(batch, entry, start, length, self.num_rows)

    @cute.jit
    def end_of(self, span: RaggedSpan):
        """Where its rows end, those that do not count included; the last one has all the rest."""
        end = self.num_rows
        if self.cu_seqlens.shape[0] > 0:
            if span.batch < self.cu_seqlens.shape[0] - 2:
                end = clamp(self.cu_seqlens[span.batch + 1], span.start, self.num_rows)
        return end

    def block(self, entry, block, num_rows: int) -> tuple[RaggedSpan, Any]:
        """The sequence that block `block` of an entry belongs to, and its place among its own."""
        span = self[self.batch_of(entry, block, num_rows)]
        return span, block - span.first_block(num_rows)

    @cute.jit
    def holds(self, entry, row):
        """Whether a row of an entry belongs to a sequence."""
        batch = entry
        if self.cu_seqlens.shape[0] > 0:
            batch, last = cutlass.Int32(0), self.cu_seqlens.shape[0] - 2
            while batch < last:  # the last sequence that does not begin behind the row
                middle = (batch + last + 1) // 2
                if self.cu_seqlens[middle] <= row:
                    batch = middle
                else:
                    last = middle - 1
        span = self[batch]
        return row >= span.start and row < span.start + span.length

    @cute.jit
    def batch_of(self, entry, block, num_rows: int):
        """The sequence that block `block` of an entry belongs to: see RaggedSpan.first_block."""
        batch = entry
        if self.cu_seqlens.shape[0] > 0:
            batch, last = cutlass.Int32(0), self.cu_seqlens.shape[0] - 2
            while batch < last:
                middle = (batch + last + 1) // 2
                if self[middle].first_block(num_rows) <= block:
                    batch = middle
                else:
                    last = middle - 1
        return batch


@dataclass(frozen=True)
class PagedSpans:
    """Where the keys of sequences lie in pages."""

    page_size: Any
    pages: cute.Tensor  # (b, pages) Int32: a sequence's pages, by the positions of their keys
    seqused: cute.Tensor  # (b,) Int32, or (0,): all that the pages of a sequence hold
    leftpad: cute.Tensor  # (b,) Int32: how many of these come before the first key; or (0,)
    rows_at_once: cutlass.Constexpr[int]

    @cute.jit
    def __getitem__(self, batch) -> PagedSpan:
        """Lengths that the table cannot have are cut to what it has."""
        start, end = cutlass.Int32(0), self.pages.shape[1] * self.page_size
        if self.seqused.shape[0] > 0:
            end = clamp(self.seqused[batch], 0, end)
        if self.leftpad.shape[0] > 0:
            start = clamp(self.leftpad[batch], 0, end)
        length = end - start
        return PagedSpan(batch, start, length, self.page_size, self.pages, self.rows_at_once)


@dataclass(frozen=True)
class RaggedSequences:
    """All of a call with lengths of their own."""

    count: Any
    queries: RaggedSpans
    keys: RaggedSpans | PagedSpans

    def __getitem__(self, batch) -> Sequence:
        return Sequence(batch, self.queries[batch], self.keys[batch])

    def query_block(self, entry, block, num_rows: int) -> tuple[RaggedSpan, Any]:
        """As of Sequences; some blocks have no rows, or would begin before their sequence."""
        return self.queries.block(entry, block, num_rows)


def ragged_view(tensor: cute.Tensor, row_mode: int) -> cute.Tensor:
    """The tensor (.., b) with the mode of ends, for TMA."""
    num_rows, stride = tensor.shape[row_mode], Int64(tensor.stride[row_mode])
    first = (tensor.iterator - num_rows * stride).align(16)
    shape, strides = (*tensor.shape, num_rows + 1), (*tensor.stride, stride)
    return cute.make_tensor(first, cute.make_layout(shape, stride=strides))
