"""Which rows of a sequence a GPU has, and which blocks of attention that makes: plain arithmetic.

A sequence is cut into equal chunks, of which every rank of `size` has one or two:

    contiguous   rank
    zigzag       rank and 2 * size - 1 - rank: one that sees little and one that sees much, so that
                 causal attention is the same work for all
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNKS = {"zigzag": 2, "contiguous": 1}  # of each rank


def chunks_of(order: str, rank: int, size: int) -> tuple[int, ...]:
    """The chunks of a rank, in the order of the sequence."""
    return (rank, 2 * size - 1 - rank) if order == "zigzag" else (rank,)


def check_order(order: str) -> None:
    if order not in CHUNKS:
        raise ValueError(f"order is {order!r}, expected {' or '.join(map(repr, CHUNKS))}")


def positions(length: int, rank: int, size: int, order: str, cu_seqlens=None) -> Tensor:
    """The rows of a sequence that a rank has, (length // size,) int64 on the CPU.

    cu_seqlens: (n + 1,), of packed sequences, each of which is cut into chunks of its own.

    Raises ValueError unless every sequence can be cut into equal chunks.
    """
    check_order(order)
    ends = (0, length) if cu_seqlens is None else cu_seqlens
    ends = ends.tolist() if isinstance(ends, Tensor) else list(ends)
    pieces = size * CHUNKS[order]
    rows = []
    for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if (end - start) % pieces:
            raise ValueError(
                f"sequence {i} has length {end - start}, expected a multiple of {pieces}: {size} "
                f"ranks with {CHUNKS[order]} chunks each ({order}); pad it"
            )
        chunk = (end - start) // pieces
        for c in chunks_of(order, rank, size):
            first = start + c * chunk
            rows.append(torch.arange(first, first + chunk, dtype=torch.int64, device="cpu"))
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *rows])


class Interval(NamedTuple):
    start: int
    end: int  # the one after the last


@dataclass(frozen=True)
class Block:
    """One call: local rows of the queries and of the keys, and the window in between.

    window: as in flash_attn_func, aligned to the last rows of the two intervals.
    """

    q: Interval
    k: Interval
    window: tuple[int, int]

    @property
    def is_full(self) -> bool:
        return self.window == (-1, -1)


def blocks(q_chunks, k_chunks, length: int, window: tuple[int, int]) -> list[Block]:
    """The blocks in which queries of some chunks see keys of others, each chunk of `length` rows.

    window: of the whole sequence, (left, right) around a query's own position; below 0: no bound.
    """
    left, right = (-1 if x < 0 else x for x in window)
    if q_chunks == k_chunks and left < 0 and right <= 0:  # chunks ascend, so that it looks causal
        rows = Interval(0, len(q_chunks) * length)
        return [Block(rows, rows, (left, right))]
    found = []
    for i, q_chunk in enumerate(q_chunks):
        for j, k_chunk in enumerate(k_chunks):
            block = _block(q_chunk * length, k_chunk * length, length, left, right)
            if block is not None:
                found.append(_moved(block, i * length, j * length))
    return _joined(_joined(found, "k", "q"), "q", "k")


def _block(q0: int, k0: int, length: int, left: int, right: int) -> Block | None:
    """Of the chunks that begin at positions q0 and k0, in rows of each; None: nothing is seen."""
    far = q0 + k0 + 2 * length  # no bound
    left, right = (far if x < 0 else x for x in (left, right))
    q1, k1 = q0 + length, k0 + length
    q = Interval(max(q0, k0 - right), min(q1, k1 + left))
    k = Interval(max(k0, q0 - left), min(k1, q1 + right))
    if q.start >= q.end or k.start >= k.end:
        return None
    window = left + k.end - q.end, right + q.end - k.end
    s_q, s_k = q.end - q.start, k.end - k.start
    window = -1 if window[0] >= s_k - 1 else window[0], -1 if window[1] >= s_q - 1 else window[1]
    return Block(Interval(q.start - q0, q.end - q0), Interval(k.start - k0, k.end - k0), window)


def _moved(block: Block, q_rows: int, k_rows: int) -> Block:
    q, k = block.q, block.k
    return Block(
        Interval(q.start + q_rows, q.end + q_rows),
        Interval(k.start + k_rows, k.end + k_rows),
        block.window,
    )


def _joined(found: list[Block], side: str, other: str) -> list[Block]:
    """Neighbours on one side become one where both are full and their other sides the same."""
    joined: list[Block] = []
    for block in sorted(found, key=lambda x: (getattr(x, other), getattr(x, side))):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.is_full
            and block.is_full
            and getattr(last, other) == getattr(block, other)
            and getattr(last, side).end == getattr(block, side).start
        ):
            both = Interval(getattr(last, side).start, getattr(block, side).end)
            joined[-1] = Block(**{side: both, other: getattr(block, other)}, window=(-1, -1))
        else:
            joined.append(block)
    return joined


def num_steps(order: str, size: int, length: int, window: tuple[int, int]) -> int:
    """How many ranks' keys a rank has to see, its own the first: the last are seen by nobody."""
    chunks = [chunks_of(order, rank, size) for rank in range(size)]
    for step in range(size - 1, 0, -1):
        if any(blocks(chunks[r], chunks[r - step], length, window) for r in range(size)):
            return step + 1
    return 1
