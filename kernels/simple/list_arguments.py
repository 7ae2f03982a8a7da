"""What a list of tiles is made for, and the tables in its memory."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int32

from ..arithmetic import minimum
from ..scheduler import ENTRY, TileList
from .rounds import Memory, Slots


@dataclass(frozen=True)
class ListArguments:
    """What a list is made for."""

    sequences: Any  # of the call: [b], count
    slots: Slots
    num_heads: Any
    num_heads_kv: Any
    window_left: Any
    window_right: Any
    max_ctas: Any  # of the kernel that computes them, before TileList.count limits them
    rows_in_l2: Any  # L2_BUDGET // bytes of a row that tiles share
    memory: cute.Tensor  # int32, `capacity`
    rows_per_query: Any = None  # Window.rows_per_query
    num_splits: Any = None  # of a tile's blocks, where each split counts as a head

    @property
    def places(self) -> Memory:
        return Memory(self.slots.count, self.num_heads)

    def tiles(self) -> TileList:
        return TileList.of(self.memory, self.places.num_tiles)

    @property
    def num_ctas(self):
        return minimum(self.max_ctas, self.tiles().count)

    @property
    def items(self) -> cute.Tensor:
        """Position in the CTA's list, CTA, slot * num_heads + first head, how many heads."""
        return self._table(self.places.items, self.places.num_tiles, ENTRY)

    @property
    def pairs(self) -> cute.Tensor:
        """By slot: batch, block, cost (0: none), class of cost."""
        return self._table(self.places.pairs, self.slots.count, ENTRY)

    @property
    def order(self) -> cute.Tensor:
        """Slot and cost; from each chunk's first slot on its pairs, longest first."""
        return self._table(self.places.order, self.slots.count, 2)

    def _table(self, offset, rows, columns: int) -> cute.Tensor:
        """offset: a multiple of 16 bytes, as all of Memory are."""
        layout = cute.make_layout((rows, columns), stride=(columns, 1))
        return cute.make_tensor((self.memory.iterator + offset).align(16), layout)


def load_row(table: cute.Tensor, row) -> tuple:
    values = cute.make_rmem_tensor(table.shape[1], Int32)
    cute.autovec_copy(table[row, None], values)
    return tuple(values[i] for i in range(table.shape[1]))


def store_row(table: cute.Tensor, row, values: tuple):
    fragment = cute.make_rmem_tensor(ENTRY, Int32)
    for i, value in enumerate(values):
        fragment[i] = value
    cute.autovec_copy(fragment, table[row, None])
