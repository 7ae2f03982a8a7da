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
        p = (q @ keys.transpose(-1, -2)).mul_(x.softmax_scale).sub_(lse).exp_()
        if unseen is not None:
            p.masked_fill_(unseen.repeat(group, 1), 0.0)
        p.masked_fill_(lse == -math.inf, 0.0)
        ds = (dout @ values.transpose(-1, -2)).sub_(delta).mul_(p)
        dv += p.transpose(-1, -2) @ dout
        dk += ds.transpose(-1, -2) @ q
        dq = (ds @ keys).mul_(x.softmax_scale).view(b, h_q, stop - start, d)
        x.dq[:, start:stop] = dq.transpose(1, 2)
    x.dk.copy_(dk.mul_(x.softmax_scale).transpose(1, 2))
    x.dv.copy_(dv.transpose(1, 2))
