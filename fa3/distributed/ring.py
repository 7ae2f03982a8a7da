"""Attention in a ring: keys and values travel, queries stay, results are merged by their lse.

Step s of rank r computes what its queries get from the keys of rank r - s, while those of the next
step arrive. In the backward pass keys, values and their gradients travel; the gradients come home
after the last step. A block's gradients need nothing of the other blocks but the final out and lse.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autograd  # noqa: F401 - registers torch.ops.fa3.backward
from ..interface import flash_attn_func, flash_attn_varlen_func
from .order import CHUNKS, Block, Interval, blocks, chunks_of, num_steps


class Ring(NamedTuple):
    """The ranks of a process group."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group) -> "Ring":
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed has no process group: call "
                "torch.distributed.init_process_group first, or fa3.flash_attn_func on one GPU"
            )
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def shift(self, tensors: Sequence[Tensor], by: int = 1) -> "Arriving":
        """Begin to send contiguous tensors to rank + by, and to receive those of rank - by."""
        if by % self.size == 0:
            return Arriving(tuple(tensors), (), ())
        arriving = tuple(map(torch.empty_like, tensors))
        to, source = (self._peer(self.rank + n) for n in (by, -by))
        # bytes: not every backend knows every dtype
        sends = [dist.P2POp(dist.isend, _bytes(x), to, self.group) for x in tensors]
        receives = [dist.P2POp(dist.irecv, _bytes(x), source, self.group) for x in arriving]
        requests = dist.batch_isend_irecv([*sends, *receives])
        return Arriving(arriving, tuple(tensors), tuple(requests))

    def _peer(self, rank: int) -> int:
        rank %= self.size
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


class Arriving(NamedTuple):
    """Tensors on their way; those sent must live as long."""

    tensors: tuple[Tensor, ...]
    sent: tuple[Tensor, ...]
    requests: tuple

    def wait(self) -> tuple[Tensor, ...]:
        for request in self.requests:
            request.wait()
        return self.tensors


class Options(NamedTuple):
    """What every rank's call says alike."""

    softmax_scale: float | None
    window: tuple[int, int]
    softcap: float
    deterministic: bool
    order: str
    max_seqlen: int | None  # of packed sequences, the longest as a whole


class Dense:
    """Equal sequences: q (b, s, h, d), rows are a dimension of their own."""

    def __init__(self, options: Options, q: Tensor):
        self.options = options
        self.length = q.shape[1] // CHUNKS[options.order]

    def take(self, x: Tensor, rows: Interval) -> Tensor:
        return x.narrow(1, rows.start, rows.end - rows.start)

    def take_lse(self, lse: Tensor, rows: Interval) -> Tensor:
        return lse.narrow(-1, rows.start, rows.end - rows.start)

    def put(self, x: Tensor, rows: Interval, values: Tensor) -> None:
        self.take(x, rows).copy_(values)

    def put_lse(self, lse: Tensor, rows: Interval, values: Tensor) -> None:
        self.take_lse(lse, rows).copy_(values)

    def add(self, x: Tensor, rows: Interval, values: Tensor) -> None:
        self.take(x, rows).add_(values)

    def attend(self, q, k, v, block: Block) -> tuple[Tensor, Tensor]:
        scale, _, softcap, *_ = self.options
        options = {"window_size": block.window, "softcap": softcap, "return_attn_probs": True}
        return flash_attn_func(q, k, v, scale, **options)

    def lengths(self, block: Block) -> tuple:
        """fa3::backward's cu_seqlens, seqused and max_seqlen."""
        return ()


class Packed:
    """Packed sequences, each cut into chunks: q (total, h, d); rows are those of two chunks."""

    def __init__(self, ring: Ring, options: Options, cu_seqlens: Tensor):
        self.options = options
        self.chunks = CHUNKS[options.order]
        self.pieces = ring.size * self.chunks  # of a whole sequence
        self.cu_seqlens = (cu_seqlens // self.pieces).int()  # of one chunk of each
        self.length = 2  # rows of a chunk, for `blocks`: the masks are those of any length
        self.whole = Interval(0, self.chunks * self.length)
        self._rows: dict[Interval, Tensor] = {}

    def _count(self, rows: Interval) -> int:
        return (rows.end - rows.start) // self.length

    def _index(self, rows: Interval, total: int) -> Tensor:
        """Of some chunks of all sequences, among a rank's rows."""
        if rows not in self._rows:
            count, ends = self._count(rows), self.cu_seqlens.long()
            number = total * count // self.chunks
            row = torch.arange(number, dtype=torch.int64, device=ends.device)
            sequence = torch.searchsorted(ends[1:] * count, row, right=True)
            before = ends[:-1] * (self.chunks - count)  # rows of others, ahead of the sequence
            first = ends.diff() * (rows.start // self.length)
            self._rows[rows] = row + (before + first)[sequence]
        return self._rows[rows]

    def take(self, x: Tensor, rows: Interval) -> Tensor:
        return x if rows == self.whole else x.index_select(0, self._index(rows, x.shape[0]))

    def take_lse(self, lse: Tensor, rows: Interval) -> Tensor:
        return lse if rows == self.whole else lse.index_select(1, self._index(rows, lse.shape[1]))

    def put(self, x: Tensor, rows: Interval, values: Tensor) -> None:
        if rows == self.whole:
            x.copy_(values)
        else:
            x.index_copy_(0, self._index(rows, x.shape[0]), values)

    def put_lse(self, lse: Tensor, rows: Interval, values: Tensor) -> None:
        self.put(lse.T, rows, values.T)

    def add(self, x: Tensor, rows: Interval, values: Tensor) -> None:
        if rows == self.whole:
            x.add_(values)
        else:
            x.index_add_(0, self._index(rows, x.shape[0]), values.to(x.dtype))

    def attend(self, q, k, v, block: Block) -> tuple[Tensor, Tensor]:
        scale, _, softcap, *_ = self.options
        cu_q, cu_k, _, _, *longest = self.lengths(block)
        options = {"window_size": block.window, "softcap": softcap, "return_attn_probs": True}
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, softmax_scale=scale, **options)

    def lengths(self, block: Block) -> tuple:
        counts = self._count(block.q), self._count(block.k)
        chunk = self.options.max_seqlen // self.pieces
        cu_seqlens = (self.cu_seqlens * n for n in counts)
        return *cu_seqlens, None, None, *(n * chunk for n in counts)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, of the results over each; differentiable.

    out, part (.., s, h, dv), lse, part_lse (.., h, s); computed in fp32.
    """
    total = torch.logaddexp(lse, part_lse)
    return _weighted(out, lse, total) + _weighted(part, part_lse, total), total


def _weighted(out: Tensor, lse: Tensor, total: Tensor) -> Tensor:
    """The share that a part has in the whole; rows that see no key have none."""
    weight = (lse - total.masked_fill(total == -torch.inf, 0.0)).exp()
    return out.float() * weight.transpose(-1, -2).unsqueeze(-1)


class RingAttention(torch.autograd.Function):
    """out (.., s, h_q, dv) and lse (.., h_q, s) of local queries, to the keys of all ranks."""

    @staticmethod
    def forward(ctx, q, k, v, sink, rows, ring, options):  # noqa: PLR0913
        out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float32)
        shape = *q.shape[:-3], q.shape[-2], q.shape[-3]
        lse = q.new_full(shape, -torch.inf, dtype=torch.float32)
        keys = k, v
        for step in _steps(ring, rows, options):
            if not step.is_last:
                arriving = ring.shift([x.contiguous() for x in keys])
            for block in step.blocks:
                taken = rows.take(q, block.q), *(rows.take(x, block.k) for x in keys)
                part = rows.attend(*taken, block)
                merged = merge(rows.take(out, block.q), rows.take_lse(lse, block.q), *part)
                rows.put(out, block.q, merged[0])
                rows.put_lse(lse, block.q, merged[1])
            if not step.is_last:
                keys = arriving.wait()
        if sink is not None:
            out, lse = merge(out, lse, torch.zeros_like(out), _per_row(sink, lse))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.rows, ctx.ring, ctx.options = rows, ring, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink, out, lse = ctx.saved_tensors
        rows, ring, options = ctx.rows, ctx.ring, ctx.options
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        keys = k, v
        dq, travelling = _zeros(q), None
        for step in _steps(ring, rows, options):
            if not step.is_last:
                arriving = ring.shift([x.contiguous() for x in keys])
            dk, dv = map(_zeros, keys)
            for block in step.blocks:
                result = dout, out, lse, dlse
                found = _block_gradients(rows, options, block, (q, *keys), result)
                where = block.q, block.k, block.k
                for total, place, x in zip((dq, dk, dv), where, found, strict=True):
                    rows.add(total, place, x)
            if travelling is not None:
                dk, dv = (x + y for x, y in zip((dk, dv), travelling.wait(), strict=True))
            travelling = ring.shift((dk, dv), -step.number if step.is_last else 1)
            if not step.is_last:
                keys = arriving.wait()
        dk, dv = travelling.wait()
        dsink = None if sink is None else _sink_gradient(sink, dout, out, lse, dlse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None


class Step(NamedTuple):
    number: int
    is_last: bool
    blocks: list[Block]


def _steps(ring: Ring, rows, options: Options):
    """The steps of a rank: whose keys it has, and what its queries see of them."""
    more = rows.length, options.window
    count = num_steps(options.order, ring.size, *more)
    mine = chunks_of(options.order, ring.rank, ring.size)
    for number in range(count):
        theirs = chunks_of(options.order, (ring.rank - number) % ring.size, ring.size)
        yield Step(number, number == count - 1, blocks(mine, theirs, *more))


def _block_gradients(rows, options: Options, block: Block, qkv, result) -> Sequence[Tensor]:
    """dq, dk and dv of a block's rows.

    result: dout, out, lse and dlse of all local queries over all keys; dlse may be None.
    """
    q, k, v = (rows.take(x, y) for x, y in zip(qkv, (block.q, block.k, block.k), strict=True))
    dout, out = (rows.take(x, block.q) for x in result[:2])
    lse, dlse = (None if x is None else rows.take_lse(x, block.q) for x in result[2:])
    scale, _, softcap, deterministic, *_ = options
    given = scale, False, *block.window, 0, softcap, deterministic, *rows.lengths(block)
    return torch.ops.fa3.backward(dout, q, k, v, out, lse, dlse, *given)[:3]


def _sink_gradient(sink: Tensor, dout, out, lse, dlse) -> Tensor:
    """Of the local queries, (h_q,): a sink has a share in each row's sum, and no value."""
    share = (_per_row(sink, lse) - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    slope = (dout.float() * out.float()).sum(-1).transpose(-1, -2).neg()  # (.., h_q, s)
    slope = slope if dlse is None else slope + dlse
    return (share * slope).movedim(-2, 0).flatten(1).sum(1).to(sink.dtype)


def _per_row(sink: Tensor, lse: Tensor) -> Tensor:
    return sink.float()[:, None].expand_as(lse)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
