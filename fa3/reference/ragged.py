"""Sequences with lengths of their own in plain torch: one after another, as dense ones."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.arguments import FwdArguments
from ..kernels.bwd_arguments import BwdArguments
from ..kernels.bwd_signature import BwdSignature
from ..kernels.signature import Q_BLOCK, Signature


def forward(dense: Callable, signature: Signature, arguments: Sequence) -> None:
    """dense(signature, arguments): attention of sequences of one length, which have keys."""
    x = FwdArguments(*arguments)
    signature = dataclasses.replace(signature, is_ragged=False, page_rows=0)
    for i in range(x.num_sequences):
        one = _sequence(x, i, signature)
        if one.q.shape[1]:
            run = dense if one.k.shape[1] else see_no_key
            run(signature, [getattr(one, field.name) for field in dataclasses.fields(one)])


def backward(dense: Callable, signature: BwdSignature, arguments: Sequence) -> None:
    """dense(signature, arguments): gradients of sequences of one length, which is not 0."""
    x = BwdArguments(*arguments)
    of_q = ("dq",) if signature.with_dq else ()
    of_k = ("dk", "dv") if signature.with_dkv else ()
    for name in (*of_q, *of_k):
        getattr(x, name).zero_()
    for i in range(x.num_sequences):
        q = Rows.of(i, x.q.shape[1], x.cu_seqlens_q, x.seqused_q)
        k = Rows.of(i, x.k.shape[1], x.cu_seqlens_k, x.seqused_k)
        if q.length and k.length:
            by_queries = {name: q.cut(getattr(x, name)) for name in ("q", "out", "dout", *of_q)}
            by_keys = {name: k.cut(getattr(x, name)) for name in ("k", "v", *of_k)}
            lse = {"lse": q.cut(x.lse, dim=2), "dlse": x.dlse}
            if x.dlse.shape[0]:
                lse["dlse"] = q.cut(x.dlse, dim=2)
            one = dataclasses.replace(x, **by_queries, **by_keys, **lse)
            dense(signature, [getattr(one, field.name) for field in dataclasses.fields(one)])


def see_no_key(signature: Signature, arguments: Sequence) -> None:
    """Where the tensor of keys has no rows at all; does not wait for the device."""
    x = FwdArguments(*arguments)
    lse = x.lse.new_full((1, 1), -math.inf) if x.sinks is None else x.sinks
    if not signature.is_ragged:
        x.out.zero_()
        x.lse.copy_(lse[..., None])
        return
    counted = counts(x.q.shape[1], x.cu_seqlens_q, x.seqused_q, x.q.device)
    if lse.shape[0] > 1 and x.cu_seqlens_q.numel():
        lse = lse[_sequence_of(x.q.shape[1], x.cu_seqlens_q)].mT[None]  # (1, h_q, num_rows)
    else:
        lse = lse[..., None]
    x.out.masked_fill_(counted[:, :, None, None], 0.0)
    x.lse.copy_(torch.where(counted[:, None], lse, x.lse))


def counts(num_rows: int, cu_seqlens: Tensor, seqused: Tensor, device) -> Tensor:
    """Which rows belong to a sequence: (b or 1, num_rows)."""
    row = torch.arange(num_rows, dtype=torch.int32, device=device)
    if cu_seqlens.numel() == 0:
        used = seqused if seqused.numel() else row.new_full((1,), num_rows)
        return row < used[:, None]
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    if seqused.numel():
        ends = starts + torch.minimum(seqused, ends - starts)
    sequence = _sequence_of(num_rows, cu_seqlens)
    is_used = row < torch.cat([ends, ends.new_zeros(1)])[sequence]  # [-1]: before the first one
    return is_used[None]


def _sequence_of(num_rows: int, cu_seqlens: Tensor) -> Tensor:
    """(num_rows,) of packed rows; -1 before the first one."""
    row = torch.arange(num_rows, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[:-1], row, right=True, out_int32=True) - 1


@dataclass(frozen=True)
class Rows:
    """Where a sequence lies in a tensor of queries or of keys."""

    index: int
    entry: int  # of the batch
    start: int
    length: int

    @classmethod
    def of(cls, index: int, num_rows: int, cu_seqlens: Tensor, seqused: Tensor) -> "Rows":
        entry, start, end = index, 0, num_rows
        if cu_seqlens.numel():
            entry, (start, end) = 0, cu_seqlens[index : index + 2].tolist()
        length = end - start
        if seqused.numel():
            length = min(length, seqused[index].item())
        return cls(index, entry, start, length)

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        return x[self.entry : self.entry + 1].narrow(dim, self.start, self.length)

    def blocks(self, x: Tensor, block: int) -> Tensor:
        """The sequence's own: of (b, heads, 1), or of (b or 1, heads, blocks)."""
        entry = min(self.index, x.shape[0] - 1)
        x = x[entry : entry + 1]
        if x.shape[2] == 1:
            return x
        first = self.start // block + self.index - self.entry
        return x[:, :, first : first + max(1, -(-self.length // block))]


def _gathered(x: FwdArguments, i: int) -> FwdArguments:
    """With the keys of sequence i, which are in pages, as its entry of a dense tensor."""
    rows = Rows.of(i, x.page_table.shape[1] * x.k.shape[1], x.cu_seqlens_k, x.seqused_k)
    pages = x.page_table[i, : -(-rows.length // x.k.shape[1])].long()
    b = x.page_table.shape[0]
    k, v = (t[pages].flatten(0, 1).expand(b, -1, -1, -1) for t in (x.k, x.v))
    return dataclasses.replace(x, k=k, v=v)


def _sequence(x: FwdArguments, i: int, signature: Signature) -> FwdArguments:
    """What sequence i would be given alone."""
    q = Rows.of(i, x.q.shape[1], x.cu_seqlens_q, x.seqused_q)
    if x.page_table is not None:
        x = _gathered(x, i)
    k = Rows.of(i, x.k.shape[1], x.cu_seqlens_k, x.seqused_k)
    if x.cache_leftpad is not None and x.cache_leftpad.numel():
        start = x.cache_leftpad[i].item()
        k = dataclasses.replace(k, start=start, length=k.length - start)
    one = dataclasses.replace(
        x, q=q.cut(x.q), k=k.cut(x.k), v=k.cut(x.v), out=q.cut(x.out), lse=q.cut(x.lse, dim=2)
    )
    per_sequence = slice(i, i + 1)
    if x.sinks is not None:
        one = dataclasses.replace(one, sinks=x.sinks[per_sequence])
    quantised = signature.quantised
    if signature.widens:
        of_keys = (x.k_scales, x.v_scales)
        k_scales, v_scales = (scales[per_sequence] for scales in of_keys)
        return dataclasses.replace(one, k_scales=k_scales, v_scales=v_scales)
    if quantised is None:
        return one
    k_block, v_block = quantised.k_block, quantised.v_block
    return dataclasses.replace(
        one,
        q_scales=q.blocks(x.q_scales, Q_BLOCK),
        k_scales=k.blocks(x.k_scales, k_block) if k_block else x.k_scales[per_sequence],
        v_scales=k.blocks(x.v_scales, v_block) if v_block else x.v_scales[per_sequence],
        v_shift=x.v_shift[per_sequence],
    )
