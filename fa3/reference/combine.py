"""Combining results over parts of the keys in plain torch."""

import math

from torch import Tensor


def weights(part_lse: Tensor, lse: Tensor) -> Tensor:
    """exp(lse_i - lse) of parts (n, ..) and what they come to (..); of an empty part it is 0."""
    share = (part_lse - lse).exp()
    return share.masked_fill(part_lse == lse, 1.0).masked_fill(part_lse == -math.inf, 0.0)


def forward(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """As the kernel, of dense tensors: out (b, s, h, dv) and lse (b, s, h) are written."""
    top = part_lse.amax(dim=0)
    share = weights(part_lse, top)
    total = share.sum(dim=0)
    lse.copy_(top + total.log())
    values = parts.masked_fill((part_lse == -math.inf)[..., None], 0.0)
    combined = (share[..., None] * values).sum(dim=0)
    out.copy_(combined / total.masked_fill(total == 0.0, 1.0)[..., None])
