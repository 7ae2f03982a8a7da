"""Attention in plain torch for CPU tensors: fp32 arithmetic, one block of query rows at a time."""

import functools
import math
from collections.abc import Callable, Sequence

import torch

from ..kernels.arguments import FwdArguments
from ..kernels.signature import Q_BLOCK, Quantised, Signature
from . import ragged as reference_ragged

SCORE_BYTES = 64 << 20  # of the fp32 scores held at a time


def bind(signature: Signature) -> Callable[[Sequence], None]:
    """A function that is called as the kernel compiled for `signature` is."""
    if signature.is_ragged:
        return functools.partial(reference_ragged.forward, _forward, signature)
    return functools.partial(_forward, signature)


def in_given_precision(forward):
    """Autocast, which would compute products of fp32 in 16 bits, does not reach it."""

    @functools.wraps(forward)
    def call(*arguments):
        with torch.autocast("cpu", enabled=False):
            return forward(*arguments)

    return call


@in_given_precision
def _forward(signature: Signature, arguments: Sequence) -> None:
    """out = softmax(scale * q k^T) v under the mask, lse its logarithmic denominator.

    arguments: the fields of FwdArguments, of which num_ctas has no meaning here.
    """
    x = FwdArguments(*arguments)
    q, k, v = x.q, x.k, x.v
    if signature.quantised is not None:
        q, k, v = _values(signature.quantised, x)
    elif signature.widens:
        k, v = (
            tensor.float() * scales[:, None, :, None]
            for tensor, scales in ((x.k, x.k_scales), (x.v, x.v_scales))
        )
    out, lse = x.out, x.lse
    b, s_q, h_q, d = q.shape
    s_k, h_k = k.shape[1:3]
    group = h_q // h_k
    scale = x.scale_log2 * math.log(2)
    wide = dtype_of_products()
    keys = k.permute(0, 2, 3, 1).to(wide)  # (b, h_k, d, s_k)
    values = v.transpose(1, 2).to(wide)  # (b, h_k, s_k, dv)
    rows = max(1, SCORE_BYTES // (4 * b * h_q * s_k))
    for start in range(0, s_q, rows):
        stop = min(start + rows, s_q)
        block = q[:, start:stop].to(wide).view(b, stop - start, h_k, group, d)
        block = block.permute(0, 2, 3, 1, 4).reshape(b, h_k, group * (stop - start), d)
        scores = (block @ keys).float().mul_(scale).view(b, h_q, stop - start, s_k)
        if signature.score == "softcap":
            scores.mul_(0.5).tanh_().mul_(x.softcap_log2 * math.log(2))
        window = x.window_left, x.window_right
        numbers = start, stop, s_q, s_k, *window
        unseen = hidden(signature.mask, *numbers, q.device, x.rows_per_query or 1)
        if unseen is not None:
            scores.masked_fill_(unseen, -math.inf)
        # Subtracting the maximum is exact near it; a rounded lse would not give weights of sum 1.
        top = scores.amax(dim=-1, keepdim=True)
        if signature.sinks:
            sink = x.sinks[..., None, None]
            top = torch.maximum(top, sink)
        top.masked_fill_(top == -math.inf, 0.0)  # rows that see no key: p is 0
        p = scores.sub_(top).exp_()
        total = p.sum(dim=-1, keepdim=True)  # 0, or at least 1
        if signature.sinks:
            total += (sink - top).exp_().masked_fill_(sink == math.inf, 1.0)
        lse[:, :, start:stop] = total.log().add_(top).squeeze(-1)
        o = (p.to(wide).view(b, h_k, -1, s_k) @ values).float().view(b, h_q, stop - start, -1)
        out[:, start:stop] = o.div_(total.clamp_(min=1.0)).transpose(1, 2)


def dtype_of_products() -> torch.dtype:
    """fp32, but fp64 while torch may compute products of fp32 in fewer bits.

    That setting is the process's: to change it for a call would change it for other threads.
    """
    is_exact = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    return torch.float32 if is_exact else torch.float64


def _values(quantised: Quantised, x: FwdArguments) -> tuple[torch.Tensor, ...]:
    """q, k and v in fp32; scales and shift are as `Scales.views` makes them."""
    q_scales = _per_row(x.q_scales, x.q.shape[1], Q_BLOCK)
    q = x.q.float() * q_scales.repeat_interleave(x.q.shape[2] // q_scales.shape[2], dim=2)
    k = x.k.float() * _per_row(x.k_scales, x.k.shape[1], quantised.k_block)
    if quantised.v_block:
        v_scales = _per_row(x.v_scales, x.v.shape[1], quantised.v_block)
    else:
        v_scales = x.v_scales[:, None]  # (b, 1, h_k, dv)
    return q, k, x.v.float() * v_scales + x.v_shift[:, None]


def _per_row(descale: torch.Tensor, length: int, block: int) -> torch.Tensor:
    """(b, h, n), a scale per `block` rows or a single one -> (b, length, h, 1) or (b, 1, h, 1)."""
    if descale.shape[2] > 1:
        descale = descale.repeat_interleave(block, dim=2)[:, :, :length]
    return descale.transpose(1, 2)[..., None]


def hidden(mask, start, stop, s_q, s_k, window_left, window_right, device, rows_per_query=1):
    """Which keys rows start..stop do not see, (stop - start, s_k); None: they see all."""
    if mask == "full":
        return None
    # the key on each row's diagonal
    query = torch.arange(start, stop, dtype=torch.int64, device=device) // rows_per_query
    position = query[:, None] + (s_k - s_q // rows_per_query)
    key = torch.arange(s_k, dtype=torch.int64, device=device)[None, :]
    if mask == "causal":
        return key > position
    return (key < position - window_left) | (key > position + window_right)
