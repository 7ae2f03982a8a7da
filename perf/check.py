"""Whether a backend's output is right: a wrong kernel gets no time."""

import itertools

import torch
from torch import Tensor

from .backends import Scaled
from .cases import Case

# worst row of all, relative to that row's length: several times what rounding costs, that of P and
# O in 16 bits, in e4m3 also that of q, k and v to scales of their own
ROW_ERROR = {"bf16": 2e-2, "fp16": 4e-3, "e4m3": 0.3, "int8": 0.3}
# of gradients, which differences of rounded numbers make
GRADIENT_ERROR = {dtype: 2 * limit for dtype, limit in ROW_ERROR.items()}
SCORES_BYTES = 2 << 30  # fp32 scores held at a time


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """The formula, every step in the dtype of its inputs.

    q (n, s_q, d), k (n, s_k, d), v (n, s_k, dv) -> (n, s_q, dv)
    visible (s_q, s_k), or None: every query sees every key, and each sees at least one.
    """
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        scores.masked_fill_(~visible, float("-inf"))
    return scores.softmax(-1) @ v


def visible_keys(s_q: int, s_k: int, left: int, right: int, device=None) -> Tensor | None:
    """(s_q, s_k), true where a query sees a key; None without a bound. -1 is no bound.

    Query i stands at key i + s_k - s_q.
    """
    if left < 0 and right < 0:
        return None
    position = torch.arange(s_q, device=device)[:, None] + (s_k - s_q)
    ahead = torch.arange(s_k, device=device)[None, :] - position
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in fp32 of (b, s, h, d), a few heads at a time."""
    left, right = case.window
    seen = visible_keys(case.length, case.length, left, 0 if case.causal else right, q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (b * h, s, d)
    step = max(1, SCORES_BYTES // (4 * case.length**2))
    parts = [slice(i, i + step) for i in range(0, q.shape[0], step)]
    out = torch.cat([attention(q[p].float(), k[p].float(), v[p].float(), seen) for p in parts])
    return out.unflatten(0, (case.batch, case.heads)).transpose(1, 2)


def exact_gradients(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """dq, dk and dv in fp32 of (b, s, h, d), a head at a time."""
    left, right = case.window
    seen = visible_keys(case.length, case.length, left, 0 if case.causal else right, q.device)
    found = [torch.empty(case.shape, device=q.device) for _ in range(3)]
    for b, h in itertools.product(range(case.batch), range(case.heads)):
        inputs = [x[b, :, h].float().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, seen)
        for all_of, one in zip(
            found, torch.autograd.grad(out, inputs, dout[b, :, h].float()), strict=True
        ):
            all_of[b, :, h] = one
    return found


def gradient_error(given: tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """The worst of the rows of all: relative to the row's length, or to the usual one if longer."""
    worst = 0.0
    for x, exact in zip(given, expected, strict=True):
        lengths = exact.norm(dim=-1)
        usual = lengths.square().mean().sqrt()
        error = ((x.float() - exact).norm(dim=-1) / lengths.maximum(usual)).max().item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


def row_error(out: Tensor | Scaled, expected: Tensor) -> float:
    """The worst |out - expected| / |expected| of a query row (b, s, h); inf if anything is nan."""
    out = out.decoded() if isinstance(out, Scaled) else out.float()
    difference = (out - expected).norm(dim=-1)
    worst = (difference / expected.norm(dim=-1).clamp_min(1e-20)).max().item()
    return worst if worst == worst else float("inf")
