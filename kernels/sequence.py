"""Sequence: one entry of the batch, the only owner of its lengths and of where its rows lie."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute

from .blocks import Window
from .signature import MaskKind


@dataclass(frozen=True)
class Sequence:
    """Cuts what belongs to it out of the tensors of a call, whose last mode is the batch."""

    entry: Any  # index of the batch
    s_q: Any
    s_k: Any

    def matrix(self, tensor: cute.Tensor, head) -> cute.Tensor:
        """(rows, columns, heads, b) -> (rows, columns) of a head; columns may come first."""
        return tensor[None, None, head, self.entry]

    def vector(self, tensor: cute.Tensor, head) -> cute.Tensor:
        """(n, heads, b) -> (n,) of a head."""
        return tensor[None, head, self.entry]

    def window(self, kind: MaskKind, left, right) -> Window:
        return Window(kind, self.s_q, self.s_k, left, right)


@dataclass(frozen=True)
class Sequences:
    """All of a call: they have one length."""

    s_q: Any
    s_k: Any

    def __getitem__(self, entry) -> Sequence:
        return Sequence(entry, self.s_q, self.s_k)
