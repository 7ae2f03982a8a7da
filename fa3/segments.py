"""Segments: whose the rows of a tensor are, and sums and maxima over the rows of each sequence.

A pass over rows leaves something for each block of them, (entries, h, n, d): entries are those of a
dense tensor, or the one of a packed tensor, where the blocks of a sequence follow those of another
(scales.packed_blocks). Blocks that no sequence needs hold zeros. Nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .call import lengths
from .call.scales import num_blocks, packed_blocks


class Segments(NamedTuple):
    """Of q, or of k and v; cu_seqlens and seqused as in lengths.py."""

    num_rows: int  # of the tensor, of a dense one per entry
    batch: int  # sequences
    cu_seqlens: Tensor | None
    seqused: Tensor | None

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> "Segments":
        """x (b, s, h, d) or packed (total, h, d)."""
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(x.shape[-3], batch, cu_seqlens, seqused)

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def is_ragged(self) -> bool:
        return self.is_packed or self.seqused is not None

    @property
    def lengths(self) -> Tensor:
        """(b, 1, 1) in fp32: rows that count, at least 1, as sums are divided by it."""
        if self.is_packed:
            found = self.cu_seqlens.clamp(0, self.num_rows).diff()
            if self.seqused is not None:
                found = torch.minimum(found, self.seqused)
        else:
            found = self.seqused.clamp(max=self.num_rows)
        return found.clamp(min=1).float()[:, None, None]

    def blocks(self, rows: int) -> tuple[int, int]:
        """Entries, and blocks of `rows` rows in each."""
        if self.is_packed:
            return 1, packed_blocks(self.num_rows, rows, self.batch)
        return self.batch, num_blocks(self.num_rows, rows)

    def arguments(self, rows: int, device: torch.device) -> tuple:
        """The last ones of the quantisation kernel."""
        if not self.is_ragged:
            return None, None, None
        return *lengths.or_empty((self.cu_seqlens, self.seqused), device), self.blocks(rows)[1]

    def entries(self, x: Tensor) -> Tensor:
        """With a dimension for the batch, be it of 1."""
        return x.unsqueeze(0) if self.is_packed else x

    def new_blocks(self, like: Tensor, rows: int) -> Tensor:
        """For a sum per block and channel of `like` (entries, s, h, d); zeros if it has no rows."""
        (entries, count), (h, d) = self.blocks(rows), like.shape[2:]
        if self.is_packed:  # as segment_reduce reads it
            found = like.new_empty(count, h, d, dtype=torch.float32).transpose(0, 1)[None]
        else:
            found = like.new_empty(entries, h, count, d, dtype=torch.float32)
        return found if like.numel() else found.zero_()

    def sum(self, blocks: Tensor, rows: int) -> Tensor:
        """(entries, h, n, d) -> (b, h, d)."""
        return self._reduce("sum", blocks, rows) if self.is_packed else blocks.sum(dim=2)

    def amax(self, blocks: Tensor, rows: int) -> Tensor:
        """(entries, h, n, d) -> (b, h, d), of numbers from 0 on."""
        return self._reduce("max", blocks, rows) if self.is_packed else blocks.amax(dim=2)

    def _reduce(self, what: str, blocks: Tensor, rows: int) -> Tensor:
        before = torch.arange(self.batch + 1, dtype=torch.int32, device=blocks.device)
        first = self.cu_seqlens.clamp(0, self.num_rows).cummax(dim=0).values // rows + before
        blocks = blocks[0].transpose(0, 1)
        # its checks of offsets, left out, would wait for the device
        return torch.segment_reduce(blocks, what, offsets=first, axis=0, unsafe=True, initial=0.0)
