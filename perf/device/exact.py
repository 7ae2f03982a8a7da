"""How far results of small cases are from those of fp32."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import check
from .small import Small, decoded

Lengths = Sequence[tuple[int, int]]  # queries and keys of every sequence of the batch


def judged(row, case: Small, device) -> tuple[tuple[Tensor, ...], dict[str, Tensor], float]:
    """A case of a pass: its inputs, its outputs and their error.

    Coarse: the tests judge; this is quick.

    Raises:
        ValueError: a row is further from fp32 than rounding explains.
    """
    inputs = row.inputs(case, device)
    outputs = row.call(case, inputs)
    error, limit = row.error(case, inputs, outputs), row.limits[case.dtype]
    if not error <= limit:
        raise ValueError(f"a row is off by {error:.2g} of its length, expected at most {limit}")
    return inputs, outputs, error


def output_error(case: Small, inputs: Sequence[Tensor], out: Tensor, lengths: Lengths) -> float:
    """Of the worst row of out (b, s_q, h_q, dv), relative to its length.

    inputs: as of `Small.inputs`. Rows that see no key are left out.
    """
    worst = 0.0
    for i, sighted, seen, (q, k, v) in _sequences(case, decoded(*inputs), lengths):
        exact = check.attention(q[:, sighted], k, v, seen)
        given = out[i, : q.shape[1]].transpose(0, 1)[:, sighted]
        worst = max(worst, check.row_error(given, exact))
    return worst


def gradient_error(
    case: Small, inputs: Sequence[Tensor], gradients: Sequence[Tensor], lengths: Lengths
) -> float:
    """Of the worst row of dq, dk and dv, as check.gradient_error.

    inputs: q, k, v, and dout (b, s_q, h_q, dv).
    """
    worst = 0.0
    *qkv, dout = inputs
    for i, sighted, seen, parts in _sequences(case, decoded(*qkv), lengths):
        q, k, v = (x.detach().requires_grad_() for x in parts)
        out = check.attention(q[:, sighted], k, v, seen)
        n_q, n_k = q.shape[1], k.shape[1]
        upstream = dout[i, :n_q].float().transpose(0, 1)[:, sighted]
        dq, *of_keys = torch.autograd.grad(out, (q, k, v), upstream)
        group = case.h_q // case.h_k
        exact = [dq, *(x.unflatten(0, (-1, group)).sum(1) for x in of_keys)]
        given = [x[i, :n].transpose(0, 1) for x, n in zip(gradients, (n_q, n_k, n_k), strict=True)]
        worst = max(worst, check.gradient_error(given, exact))
    return worst


def _sequences(case: Small, qkv: Iterable[Tensor], lengths: Lengths):
    """(place, rows that see a key (n_q,), check.visible_keys of these, [q, k, v] (h_q, n, d))."""
    q, k, v = qkv
    left, right = case.window
    for i, (n_q, n_k) in enumerate(lengths):
        if not n_q or not n_k:
            continue
        seen = check.visible_keys(n_q, n_k, left, 0 if case.causal else right, q.device)
        sighted = q.new_ones(n_q, dtype=torch.bool) if seen is None else seen.any(-1)
        if not sighted.any():
            continue
        of_keys = (x[i, :n_k].repeat_interleave(case.h_q // case.h_k, dim=1) for x in (k, v))
        parts = [x.transpose(0, 1) for x in (q[i, :n_q], *of_keys)]
        yield i, sighted, None if seen is None else seen[sighted], parts
