"""Gradients of attention in plain torch for CPU tensors: fp32, one block of rows at a time."""

import functools
import math
from collections.abc import Callable, Sequence

import torch

from ..kernels.bwd_arguments import BwdArguments
from ..kernels.bwd_signature import BwdSignature
from . import ragged as reference_ragged
from .attention import SCORE_BYTES, dtype_of_products, hidden, in_given_precision


def bind(signature: BwdSignature) -> Callable[[Sequence], None]:
    """A function that is called as the kernels compiled for `signature` are."""
    if signature.is_ragged:
        return functools.partial(reference_ragged.backward, _backward, signature)
    return functools.partial(_backward, signature)


@in_given_precision
def _backward(signature: BwdSignature, arguments: Sequence) -> None:
    """dq, dk and dv; P is computed again from lse, and is 0 in rows that see no key.

    arguments: the fields of BwdArguments, of which the workspace and num_ctas are not used; of
    equal lengths.
    """
    x = BwdArguments(*arguments)
    b, s_q, h_q, d = x.q.shape
    s_k, h_k = x.k.shape[1:3]
    group, wide = h_q // h_k, dtype_of_products()
    scale = x.scale_log2 * math.log(2)
    keys, values = (t.transpose(1, 2).to(wide) for t in (x.k, x.v))  # (b, h_k, s_k, ..)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    rows = max(1, SCORE_BYTES // (4 * b * h_q * s_k))

    def by_key_head(t: torch.Tensor) -> torch.Tensor:
        """(b, rows, h_q, width) -> (b, h_k, group * rows, width)."""
        return t.to(wide).transpose(1, 2).reshape(b, h_k, -1, t.shape[-1])

    for start in range(0, s_q, rows):
        stop = min(start + rows, s_q)
        q, out, dout = (by_key_head(t[:, start:stop]) for t in (x.q, x.out, x.dout))
        lse = x.lse[:, :, start:stop].reshape(b, h_k, -1, 1)
        delta = (out * dout).sum(dim=-1, keepdim=True)
        if x.dlse.shape[0]:
            delta = delta - x.dlse[:, :, start:stop].reshape(b, h_k, -1, 1)
        delta.masked_fill_(lse == -math.inf, 0.0)
        window = x.window_left, x.window_right
        unseen = hidden(signature.mask, start, stop, s_q, s_k, *window, q.device)
        scores, slope = (q @ keys.transpose(-1, -2)).mul_(scale), None
        if signature.score == "softcap":
            tanh = scores.mul_(0.5).tanh_()
            slope = 1 - tanh.square()
            scores.mul_(x.softcap_log2 * math.log(2))
        p = scores.sub_(lse).exp_()
        if unseen is not None:
            p.masked_fill_(unseen.repeat(group, 1), 0.0)
        p.masked_fill_(lse == -math.inf, 0.0)
        ds = (dout @ values.transpose(-1, -2)).sub_(delta).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        if signature.with_dkv:
            dv += p.transpose(-1, -2) @ dout
            dk += ds.transpose(-1, -2) @ q
        if signature.with_dq:
            dq = (ds @ keys).mul_(x.softmax_scale).view(b, h_q, stop - start, d)
            x.dq[:, start:stop] = dq.transpose(1, 2)
    if signature.with_dkv:
        x.dk.copy_(dk.mul_(x.softmax_scale).transpose(1, 2))
        x.dv.copy_(dv.transpose(1, 2))


@in_given_precision
def row_stats(out, dout, lse, dlse, counts=None) -> torch.Tensor:
    """BwdArguments.row_stats with a single block of all rows.

    counts: (b, s_q), which rows count; None: all.
    """
    wide = dtype_of_products()
    delta = (out.to(wide) * dout.to(wide)).sum(dim=-1).float().transpose(1, 2)  # (b, h_q, s_q)
    if dlse.shape[0]:
        delta = delta - dlse
    blind = lse == -math.inf
    if counts is not None:
        blind = blind | ~counts[:, None]
    stats = (lse / math.log(2)).masked_fill(blind, math.inf), delta.masked_fill(blind, 0.0)
    return torch.cat(stats, dim=-1).unsqueeze(2)
