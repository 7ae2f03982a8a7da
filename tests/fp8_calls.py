"""Calls with one-byte inputs: sizes, every form of scales, and their attention in fp64."""

import numpy as np
import torch

from . import textbook

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
B, S_Q, S_K, H_Q, H_K, D, DV = 2, 140, 200, 4, 2, 64, 48
OUT_SHAPE = (B, S_Q, H_Q, DV)
FORMS = {  # argument -> form -> shape
    "q_descale": {"none": None, "head": (B, H_K), "128": (B, H_Q, 2)},
    "k_descale": {"none": None, "head": (B, H_K), "128": (B, H_K, 2), "64": (B, H_K, 4)},
    "v_descale": {
        "none": None,
        "head": (B, H_K),
        "128": (B, H_K, 2),
        "64": (B, H_K, 4),
        "channels": (B, H_K, 1, DV),
    },
}
SHIFT_SHAPE = (B, H_K, DV)  # of v_shift


def numbers(*shape, dtype):
    """About normal, once descaled as `descales` does."""
    x = torch.randn(shape)
    return (32 * x).clamp(-127, 127).to(INT8) if dtype == INT8 else x.to(dtype)


def inputs(q=E4M3, k=E4M3, v=E4M3, s_q=S_Q, s_k=S_K):
    return (
        numbers(B, s_q, H_Q, D, dtype=q),
        numbers(B, s_k, H_K, D, dtype=k),
        numbers(B, s_k, H_K, DV, dtype=v),
    )


def descales(q="none", k="none", v="none", unit=1.0):
    """Those of q and k are around `unit`."""
    given = {}
    for name, form, around in (("q_descale", q, unit), ("k_descale", k, unit), ("v_descale", v, 1)):
        if form != "none":
            given[name] = around * (torch.rand(FORMS[name][form]) + 0.5)
    return given


def values(x, descale=None, form="none"):
    """Bytes (b, s, h, d) times their scales, in fp64."""
    x = x.to(torch.float64).numpy()
    if descale is None:
        return x
    scale = descale.double().numpy()
    if scale.ndim == 2:  # per head of k
        scale = np.repeat(scale, x.shape[2] // scale.shape[1], axis=1)[:, None, :, None]
    elif scale.ndim == 3:
        scale = np.repeat(scale, int(form), axis=2)[:, :, : x.shape[1]]
        scale = scale.transpose(0, 2, 1)[..., None]
    else:
        scale = scale.transpose(0, 2, 1, 3)
    return x * scale


def shifted(v, v_shift):
    """Values (b, s, h, dv) in fp64, plus the shift of each channel."""
    return v + v_shift.double().numpy()[:, None]


def textbook_attention(q, k, v, scale, causal=False, window=(-1, -1)):
    left, right = window[0], 0 if causal else window[1]
    pairs = [
        textbook.multi_head_attention(*arrays, scale, left, right)
        for arrays in zip(q, k, v, strict=True)
    ]
    out, lse = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    return out, lse


def exact(q, k, v, scale, causal=False):
    """Attention of tensors in fp64."""
    return textbook_attention(*(x.double().numpy() for x in (q, k, v)), scale, causal)


def real(dtype=torch.bfloat16, d=64, s_q=S_Q, s_k=S_K, offset=0.0):
    """16-bit q, k, v; `offset` is common to all keys, as in real models."""
    q, k, v = (
        torch.randn(B, s, h, width)
        for s, h, width in ((s_q, H_Q, d), (s_k, H_K, d), (s_k, H_K, DV))
    )
    return q.to(dtype), (k + offset * torch.randn(d)).to(dtype), v.to(dtype)
