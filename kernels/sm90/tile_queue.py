"""A dynamic schedule: every next tile goes to the CTA that asks first.

    counter    global memory, 0 between launches.  A CTA's first tile is the one at its own number
               in the order of tiles; each other one lies at num_ctas + what it fetches here.
    producer   fetches ahead of a tile's last load and looks the tile up
    board      shared memory: the producer warp writes there which tile comes next, and all other
               warps of the CTA read it

How often the counter is fetched is known: each tile but the first ones is found once, and each CTA
with a tile misses once, so num_tiles times in all.  `atom.inc` wraps after as many: the last fetch
leaves it at 0 for the next launch.  Which CTA computes a tile changes no bit of its results.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass.memory import SmemAllocator

from ..arithmetic import minimum
from ..scheduler import ENTRY, TileList, TileOrder, WorkTile

SLOTS = 4
NO_TILE = -1  # in place of a block


@dataclass(frozen=True)
class TileBoard:
    """Which tile is the t-th one of this CTA: in slot t % SLOTS, until tile t + SLOTS is known.

    full: 1 arrival per slot, the producer warp's.
    No barrier says that a slot may be overwritten, as that of Q does.  The producer writes tile t
    after it has loaded the Q of tile t - 1, so after the consumers gave back that of tile t - 2.
    Each of them had read of tile t - 2 by then, and each warp that makes operands for them of
    tile t - 3.  The slot held tile t - 4.
    """

    tiles: cute.Tensor  # (SLOTS, ENTRY) int32: batch, m_block, head, head_kv
    full: cute.Pointer  # SLOTS mbarriers

    @staticmethod
    def of(allocator: SmemAllocator) -> "TileBoard":
        """Before mbarrier_init_fence() and a barrier of the CTA."""
        memory = allocator.allocate_array(Int32, SLOTS * ENTRY, byte_alignment=16)
        tiles = cute.make_tensor(memory, cute.make_layout((SLOTS, ENTRY), stride=(ENTRY, 1)))
        board = TileBoard(tiles, allocator.allocate_array(cutlass.Int64, SLOTS))
        board._start()
        return board

    @cute.jit
    def _start(self):
        if cute.arch.thread_idx()[0] == 0:
            for slot in cutlass.range_constexpr(SLOTS):
                cute.arch.mbarrier_init(self.full + slot, 1)

    @cute.jit
    def write(self, tile: WorkTile):
        """By one warp."""
        slot = tile.turn % SLOTS
        cute.arch.sync_warp()  # one lane arrives for all
        with cute.arch.elect_one():
            entry = cute.make_rmem_tensor(ENTRY, Int32)
            block = cutlass.select_(tile.is_valid, tile.m_block, Int32(NO_TILE))
            for i, value in enumerate((tile.batch, block, tile.head, tile.head_kv)):
                entry[i] = value
            cute.autovec_copy(entry, self.tiles[slot, None])
            cute.arch.mbarrier_arrive(self.full + slot)

    @cute.jit
    def read(self, turn) -> WorkTile:
        slot = turn % SLOTS
        cute.arch.mbarrier_wait(self.full + slot, turn // SLOTS % 2)
        entry = cute.make_rmem_tensor(ENTRY, Int32)
        cute.autovec_copy(self.tiles[slot, None], entry)
        cute.arch.sync_warp()  # one lane gives back Q for all
        batch, m_block, head, head_kv = (entry[i] for i in range(ENTRY))
        return WorkTile(m_block, head, head_kv, batch, turn, m_block != NO_TILE)


@dataclass(frozen=True)
class FetchedTiles:
    """The Schedule of the producer warp."""

    order: TileOrder | TileList
    num_tiles: Any
    cta: Any
    num_ctas: Any
    board: TileBoard

    @staticmethod
    def of(order: TileOrder | TileList, cta, num_ctas, board: TileBoard) -> "FetchedTiles":
        return FetchedTiles(order, order.num_tiles, cta, num_ctas, board)

    def first(self) -> WorkTile:
        return self._at(self.cta, Int32(0))

    @cute.jit
    def fetch(self) -> Int32:
        """The counter, in lane 0: on its way."""
        found = Int32(0)
        if cute.arch.lane_idx() == 0:
            found = cute.arch.inline_ptx(
                "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
                write_only_types=[Int32],
                read_only_args=[self.order.counter, self.num_tiles - 1],
            )
        return found

    def next(self, tile: WorkTile, fetched: Int32) -> WorkTile:
        """fetched: by fetch(), once a tile."""
        position = self.num_ctas + cute.arch.shuffle_sync(fetched, 0)
        return self._at(position, tile.turn + 1)

    def _at(self, position, turn) -> WorkTile:
        found = self.order[minimum(position, self.num_tiles)]
        tile = replace(found, turn=turn, is_valid=Boolean(position < self.num_tiles))
        self.board.write(tile)
        return tile


@dataclass(frozen=True)
class PostedTiles:
    """The Schedule of all other warps."""

    board: TileBoard

    def first(self) -> WorkTile:
        return self.board.read(Int32(0))

    def next(self, tile: WorkTile) -> WorkTile:
        return self.board.read(tile.turn + 1)
