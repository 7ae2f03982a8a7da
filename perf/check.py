"""Whether a backend's output is right: a wrong kernel gets no time."""

import torch
from torch import Tensor

from .cases import Case

# worst row of all, relative to that row's length: several times what rounding P and O costs
ROW_ERROR = {"bf16": 2e-2, "fp16": 4e-3}
SCORES_BYTES = 2 << 30  # fp32 scores held at a time


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in fp32, out (b, s, h, d) fp32, a few heads at a time."""
    visible = _visible(case, q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (b * h, s, d)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    step = max(1, SCORES_BYTES // (4 * case.length**2))
    for i in range(0, q.shape[0], step):
        part = slice(i, i + step)
        scores = q[part].float() @ k[part].float().mT * case.head_dim**-0.5
        if visible is not None:
            scores.masked_fill_(~visible, float("-inf"))
        out[part] = scores.softmax(-1) @ v[part].float()
    return out.unflatten(0, (case.batch, case.heads)).transpose(1, 2)


def _visible(case: Case, device) -> Tensor | None:
    left, right = case.window
    if case.causal:
        right = 0
    if left < 0 and right < 0:
        return None
    i = torch.arange(case.length, device=device)
    ahead = i[None, :] - i[:, None]  # key minus query
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def row_error(out: Tensor, expected: Tensor) -> float:
    """The worst |out - expected| / |expected| of a query row (b, s, h); inf if anything is nan."""
    difference = (out.float() - expected).norm(dim=-1)
    worst = (difference / expected.norm(dim=-1).clamp_min(1e-20)).max().item()
    return worst if worst == worst else float("inf")
