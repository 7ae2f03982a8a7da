"""Nested tensors of layout torch.jagged, as the packed sequences that they hold."""

import torch
from torch import Tensor

from .call.lengths import Lengths


def is_jagged(x) -> bool:
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged


def unpack(q, k, v, out) -> tuple:
    """The values (total, h, d) of q, k and v, their Lengths, and bounds on the longest.

    Raises:
        ValueError: their ragged dimension is not the second, k and v do not share their offsets,
            or `out` is given.
        NotImplementedError: rows between sequences belong to none.
    """
    if out is not None:
        raise ValueError("out is given but q is a nested tensor, expected None")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x._ragged_idx != 1:
            raise ValueError(
                f"{name} is nested with {x.dim()} dimensions, of which {x._ragged_idx} is ragged, "
                "expected (batch, lengths, heads, head dim): transpose the dense view"
            )
        if x.lengths() is not None:
            raise NotImplementedError(
                f"{name} is nested with rows that belong to no sequence: call contiguous() first"
            )
    if v.shape[1] != k.shape[1]:
        raise ValueError(
            f"v has lengths {v.shape[1]} but k has {k.shape[1]}, expected one tensor of offsets "
            "for both: torch.nested.nested_tensor_from_jagged(values, k.offsets())"
        )
    cu_seqlens = (x.offsets().to(torch.int32) for x in (q, k))
    values = q.values(), k.values(), v.values()
    longest = values[0].shape[0], values[1].shape[0]  # the result does not depend on them
    return values, Lengths(*cu_seqlens), longest


def packed_like(q: Tensor, out: Tensor) -> Tensor:
    """out (total, h, dv) with the sequences of q."""
    return torch.nested.nested_tensor_from_jagged(
        out, q.offsets(), min_seqlen=q._maybe_min_seqlen, max_seqlen=q._maybe_max_seqlen
    )
