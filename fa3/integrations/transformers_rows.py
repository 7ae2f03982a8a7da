"""Which rows of q, k and v count: padded batches, free space of static caches, packed sequences.

All of it is found once per forward, by the mask function, and used by every layer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Of each sequence of a dense tensor (b, s, h, d) some rows count, the others are padding."""

    lengths: Tensor  # (b,) int32: how many
    order: Tensor | None = None  # (b, s): where those that count are, then the others
    places: Tensor | None = None  # the inverse; both are None where those that count come first

    def gather(self, x: Tensor) -> Tensor:
        """x (b, s, h, d) with the rows that count before the others."""
        return x if self.order is None else _take(x, self.order)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of gather."""
        return x if self.places is None else _take(x, self.places)


class Packed(NamedTuple):
    """Sequences one after another in the rows of all batch entries, as flash_attn_varlen_func's."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, sequence: Tensor) -> "Packed":
        """sequence (b, s): equal neighbours in an entry belong together. Waits for the device."""
        b, s = sequence.shape
        is_first = torch.ones((b, s), dtype=torch.bool, device=sequence.device)
        is_first[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
        starts = is_first.flatten().nonzero().flatten().to(torch.int32)
        cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=b * s)
        return cls(cu_seqlens, cu_seqlens, s, s)


def rows(is_real: Tensor) -> Rows | None:
    """Rows of is_real (b, s), true where a row counts; None if all do.

    What can be read is: then a batch without padding costs nothing more, and one that is padded on
    the right no copies.
    """
    can_be_read = is_readable(is_real)
    if can_be_read and is_real.all():
        return None
    lengths = is_real.sum(1, dtype=torch.int32)
    row = torch.arange(is_real.shape[1], device=is_real.device).expand(is_real.shape)
    if can_be_read and not (is_real & (row >= lengths[:, None])).any():
        return Rows(lengths)
    rank = is_real.cumsum(1)  # from 1
    places = torch.where(is_real, rank - 1, lengths[:, None] + row - rank)
    order = torch.zeros_like(places).scatter(1, places, row)
    return Rows(lengths, order, places)


def is_unbroken(is_real: Tensor) -> Tensor:
    """Whether the rows that count follow each other in every sequence; a tensor."""
    starts = is_real[:, 1:] & ~is_real[:, :-1]
    return (starts.sum(1) + is_real[:, 0] <= 1).all()


def is_readable(x: Tensor) -> bool:
    """Its values may be read, if need be by waiting for a device: nobody records what is done."""
    if type(x) is not Tensor or x.device.type == "meta":
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch.jit.is_tracing():
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _take(x: Tensor, order: Tensor) -> Tensor:
    order = order.to(x.device)
    entry = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[entry, order]
