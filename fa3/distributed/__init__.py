"""Attention over sequences that are spread over several GPUs.

    q, k, v = (shard(x) for x in (q, k, v))  # or the tokens and positions that they come from
    out = ring_attention(q, k, v, causal=True)

Sending and receiving are torch.distributed's; docs/torch.md says what travels.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..attend import options_of
from ..call.layout import check_tensors
from ..call.options import bool_of, int_of
from ..call.problem import DTYPES
from .order import CHUNKS, check_order, positions
from .ring import Dense, Options, Packed, Ring, RingAttention, merge

__all__ = ["merge", "positions", "ring_attention", "shard", "unshard"]


def ring_attention(  # noqa: PLR0913
    q,
    k,
    v,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    learnable_sink=None,
    deterministic=False,
    order="zigzag",
    cu_seqlens=None,
    max_seqlen=None,
    group=None,
    return_lse=False,
):
    """Attention of this rank's queries to the keys of all ranks, forward and backward.

    q (batch, s, h_q, d), k (batch, s, h_k, d), v (batch, s, h_k, dv) in fp16 or bf16: the rows of
    the whole sequence, ranks * s long, that `shard` gives this rank. All ranks of the group call it
    with the same shapes and options, and call its backward pass.
    order: how the sequence is spread. "zigzag": each rank has a chunk from the front and one from
        the back, so that causal attention is equal work for all. "contiguous": one chunk each,
        which is less to send where window_size is much shorter than the sequence.
    causal, window_size: of the whole sequence. softmax_scale, softcap, deterministic: as in
        fa3.flash_attn_func.
    learnable_sink: (h_q,), as in fa3.flash_attn_func. Its gradient is that of this rank's queries,
        to be summed over ranks as that of any weight.
    cu_seqlens: (n + 1,) int32 on q's device, of packed sequences as a whole, each spread over all
        ranks; q (total, h_q, d) then has this rank's rows of them one after another. max_seqlen: at
        least the longest as a whole. Each length is a multiple of the number of chunks. With it,
        window_size is no bound or causal.
    group: of torch.distributed, by default all ranks.

    Returns out (batch, s, h_q, dv), or (total, h_q, dv), or with return_lse the pair out and lse
    (batch, h_q, s), or (h_q, total), fp32. A rank keeps its own keys and values for the backward
    pass, not those of others.

    Raises:
        RuntimeError: torch.distributed has no process group.
        TypeError, ValueError: the message names the argument; nothing was sent.
        NotImplementedError: windows of packed sequences.
    """
    ring = Ring.of(group)
    check_order(order)
    check_tensors(q=q, k=k, v=v)
    scale, causal, left, right, _, softcap = options_of(
        softmax_scale, causal, window_size, 0, softcap
    )
    window = left, 0 if causal else right
    deterministic = bool_of("deterministic", deterministic)
    _check_shapes(q, k, v, cu_seqlens)
    _check_sink(learnable_sink, q)
    longest = None
    if cu_seqlens is not None:
        longest = _longest(max_seqlen, ring, order)
        if window not in ((-1, -1), (-1, 0)) and (left >= 0 or right > 0):
            raise NotImplementedError(
                f"window_size is {(left, right)} with cu_seqlens, expected no bound, or causal"
            )
    options = Options(scale, window, softcap, deterministic, order, longest)
    if cu_seqlens is None:
        if q.shape[1] % CHUNKS[order]:
            raise ValueError(
                f"q has length {q.shape[1]}, expected an even one with order={order!r}"
            )
        rows = Dense(options, q)
    else:
        check_tensors(cu_seqlens=cu_seqlens)
        rows = Packed(ring, options, cu_seqlens)
    out, lse = RingAttention.apply(q, k, v, learnable_sink, rows, ring, options)
    return (out, lse) if return_lse else out


def shard(x: Tensor, dim: int = 1, *, order="zigzag", cu_seqlens=None, group=None) -> Tensor:
    """This rank's rows of a tensor with a whole sequence in dimension dim; differentiable.

    Tokens, positions and labels as well as q, k and v. cu_seqlens: (n + 1,), of packed sequences,
    read by the host.

    Raises: ValueError where a sequence cannot be cut into equal chunks.
    """
    ring = Ring.of(group)
    rows = positions(x.shape[dim], ring.rank, ring.size, order, cu_seqlens)
    return x.index_select(dim, rows.to(x.device))


def unshard(x: Tensor, dim: int = 1, *, order="zigzag", cu_seqlens=None, group=None) -> Tensor:
    """The whole of what `shard` spread, on every rank; without gradients."""
    ring = Ring.of(group)
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(ring.size)]
    dist.all_gather([y.view(torch.uint8) for y in parts], x.view(torch.uint8), group=group)
    length = x.shape[dim] * ring.size
    rows = [positions(length, rank, ring.size, order, cu_seqlens) for rank in range(ring.size)]
    back = torch.cat(rows).argsort().to(x.device)
    return torch.cat(parts, dim).index_select(dim, back)


def _check_shapes(q, k, v, cu_seqlens) -> None:
    rank = 4 if cu_seqlens is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name} has {x.dim()} dimensions, {tuple(x.shape)}, expected {rank}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, expected fp16 or bf16, the same for all")
        if x.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"{name} has {tuple(x.shape[:-2])} rows but q has {tuple(q.shape[:-2])}"
            )


def _check_sink(sink, q) -> None:
    if sink is not None:
        check_tensors(learnable_sink=sink)
        if tuple(sink.shape) != (q.shape[-2],):
            raise ValueError(
                f"learnable_sink has shape {tuple(sink.shape)}, expected {(q.shape[-2],)}"
            )


def _longest(max_seqlen, ring: Ring, order: str) -> int:
    if max_seqlen is None:
        raise ValueError("max_seqlen is None but cu_seqlens is a tensor, expected a length")
    pieces = ring.size * CHUNKS[order]
    return -(-int_of("max_seqlen", max_seqlen) // pieces) * pieces
