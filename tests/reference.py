"""Attention in plain torch, twice: in fp32, and as torch would do it at the tested precision.

q (b, s_q, h_q, d), k (b, s_k, h_k, d), v (b, s_k, h_k, dv) -> out (b, s_q, h_q, dv) in q's dtype
and lse (b, h_q, s_q) in fp32. Mask: causal, and window (left, right) with -1 for no bound.
softcap: 0 for none. sink: None, (h_q,) or (b, h_q).
"""

import math

import torch


def visible(s_q, s_k, causal=False, window=(-1, -1), device=None):
    """Which keys each query sees, (s_q, s_k)."""
    left, right = window
    if causal:
        right = 0
    diagonal = torch.arange(s_q, device=device)[:, None] + (s_k - s_q)
    key = torch.arange(s_k, device=device)[None, :]
    seen = torch.ones(s_q, s_k, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= key >= diagonal - left
    if right >= 0:
        seen &= key <= diagonal + right
    return seen


def exact(  # noqa: PLR0913
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window=(-1, -1),
    precision=torch.float32,
    softcap=0.0,
    sink=None,
):
    """In this precision throughout; only the result is rounded."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_k_v = (x.to(precision) for x in (q, k, v))
    out, lse = _attention(*q_k_v, scale, 1.0, causal, window, softcap, sink)
    return out.to(q.dtype), lse


def baseline(  # noqa: PLR0913
    q, k, v, softmax_scale=None, causal=False, window=(-1, -1), softcap=0.0, sink=None
):
    """Every intermediate in q's dtype, the scale applied to k: a kernel may lose twice as much."""
    return baseline_with_lse(q, k, v, softmax_scale, causal, window, softcap, sink)[0]


def baseline_with_lse(  # noqa: PLR0913
    q, k, v, softmax_scale=None, causal=False, window=(-1, -1), softcap=0.0, sink=None
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _attention(q, k, v, 1.0, scale, causal, window, softcap, sink)


def _attention(q, k, v, q_scale, k_scale, causal, window, softcap, sink):  # noqa: PLR0913
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, h, s, d)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q * q_scale) @ (k * k_scale).transpose(-1, -2)  # (b, h_q, s_q, s_k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(q.shape[2], k.shape[2], causal, window, q.device)
    scores = scores.masked_fill(~seen, -math.inf)
    if sink is not None:  # one more key, whose value is 0
        sink = sink.to(scores.dtype).expand(scores.shape[:2])[..., None, None]
        scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    lse = torch.logsumexp(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    blind = (scores == -math.inf).all(dim=-1, keepdim=True)  # rows without a key would be 0 / 0
    p = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (p @ v).transpose(1, 2), lse
