"""Which tiles a persistent CTA computes, in which order.

    order    causal and local tiles differ in length: longest first, so that the last wave is made
             of short ones (LPT).  Within a length, heads follow each other.
    groups   heads are taken in groups whose K and V fit in L2 together.
    deal     the order is dealt to the CTAs like cards, back and forth (0..G-1, G-1..0, ...), so
             that no CTA gets the longer tile of every wave.

Plain arithmetic: runs on Python ints (tests) and on the DSL's Int32 (kernels).
"""

from dataclasses import dataclass
from typing import Any

import cutlass

from .arithmetic import clamp, minimum

L2_BUDGET = 32 << 20  # bytes of K and V that may live in L2 at once; H100 has 50 MiB


@dataclass(frozen=True)
class WorkTile:
    m_block: Any
    head: Any  # of q
    head_kv: Any
    batch: Any


@dataclass(frozen=True)
class TileOrder:
    """The order of all tiles: position -> WorkTile."""

    longest_first: cutlass.Constexpr[bool]
    num_m_blocks: Any
    num_heads: Any
    num_heads_kv: Any
    num_batches: Any
    heads_per_group: Any  # (batch, head) pairs that run side by side

    @property
    def count(self):
        return self.num_m_blocks * self.num_heads * self.num_batches

    def __getitem__(self, position) -> WorkTile:
        group_tiles = self.heads_per_group * self.num_m_blocks
        group = position // group_tiles
        first_head = group * self.heads_per_group
        heads_left = self.num_heads * self.num_batches - first_head
        heads = minimum(heads_left, self.heads_per_group)
        place = position - group * group_tiles
        rank = place // heads
        pair = first_head + place - rank * heads  # batch * num_heads + head
        m_block = self.num_m_blocks - 1 - rank if self.longest_first else rank
        batch = pair // self.num_heads
        head = pair - batch * self.num_heads
        return WorkTile(m_block, head, head // (self.num_heads // self.num_heads_kv), batch)


@dataclass(frozen=True)
class Deal:
    """The positions of one CTA."""

    cta: Any
    num_ctas: Any
    num_tiles: Any

    def _slot(self, wave):
        """This CTA's place in a wave; every second wave is dealt backwards."""
        odd = wave % 2
        return self.cta + odd * (self.num_ctas - 1 - 2 * self.cta)

    @property
    def count(self):
        """Tiles of this CTA."""
        full_waves = self.num_tiles // self.num_ctas
        rest = self.num_tiles - full_waves * self.num_ctas
        return full_waves + clamp(rest - self._slot(full_waves), 0, 1)

    def __getitem__(self, wave):
        return wave * self.num_ctas + self._slot(wave)
