"""The tile list of a ragged batch: which CTA computes which tiles, in which order.

Lengths are known on the device only, so one CTA deals the tiles there, ahead of their kernel:

    weigh    the cost of every pair (sequence, block): the blocks that it visits, and a constant
    rounds   chunks of pairs by groups of heads, what they visit of which fits in L2 together
    sort     a round's pairs by classes of cost, longest first
    deal     round after round, the next tiles go to the CTAs that have least to do, so to those
             that would be free first: list scheduling (LPT in a round)
    write    the tiles of a CTA, one after another

Of a dynamic schedule nothing is dealt: the rounds are written one after another.

No order depends on timing: the same lengths get the same list.  Blocks of equal cost stay in order.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.memory import SmemAllocator

from ..arithmetic import ceil_div, maximum, minimum
from ..blocks import Window
from ..ctas import MAX_CTAS
from ..sequence import Sequence
from ..tiling import KeyTiles, QueryTiles
from .deal import WARP, Hands, deal
from .list_arguments import ListArguments, load_row, store_row
from .rounds import CLASSES, MAX_CHUNKS, Rounds, Run, Totals

WARPS = 16
THREADS = WARPS * WARP


class ListTiles:
    """The kernel that fills a TileList, for one kind of tiles."""

    def __init__(self, tiling: QueryTiles | KeyTiles):
        self.tiling = tiling

    def __call__(self, call: ListArguments, stream):
        self.kernel(call).launch(grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, call: ListArguments):
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = thread % WARP, cute.arch.make_warp_uniform(thread // WARP)
        smem = SmemAllocator()
        totals = smem.allocate_tensor(Int32, cute.make_layout(4))
        in_class = smem.allocate_tensor(  # pairs by chunk and class
            Int32, cute.make_layout((MAX_CHUNKS, CLASSES), stride=(CLASSES, 1))
        )
        if cutlass.const_expr(not self.tiling.is_dynamic):
            begins = smem.allocate_tensor(Int32, cute.make_layout(MAX_CTAS + 1))
            num_items = smem.allocate_tensor(Int32, cute.make_layout(1))

        if thread < 4:
            totals[thread] = 0
        cute.arch.sync_threads()
        self._weigh(call, totals, thread)
        cute.arch.sync_threads()
        rounds = Rounds.of(
            self.tiling.mask,
            Totals(*(totals[i] for i in range(4))),
            call.slots.count,
            call.num_heads,
            call.num_heads_kv,
            self._num_ctas(call),
            call.rows_in_l2,
        )
        self._classify(call, rounds, thread)
        cute.arch.sync_threads()
        for first in range(0, CLASSES, WARPS):
            self._count(call, rounds, in_class, first + warp, lane)
        cute.arch.sync_threads()
        for first in range(0, CLASSES, WARPS):
            self._sort(call, rounds, in_class, first + warp, lane)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.tiling.is_dynamic):
            self._write_in_order(call, rounds, in_class, thread)
        else:
            if warp == 0:
                self._deal(call, rounds, in_class, begins, num_items, lane)
            cute.arch.sync_threads()
            self._write(call, begins, num_items[0], thread)

    def _num_ctas(self, call: ListArguments):
        """That tiles are dealt to."""
        return minimum(call.num_ctas, self.tiling.max_ctas)

    @cute.jit
    def _weigh(self, call: ListArguments, totals: cute.Tensor, thread):
        """Fill the pairs, but for their class, and the Totals."""
        work, longest, shared, longest_shared = Int32(0), Int32(0), Int32(0), Int32(0)
        for slot in cutlass.range(thread, call.slots.count, THREADS, unroll=1):
            index = self._sequence_of(call, slot)
            sequence = call.sequences[index]
            cut, rows = self.tiling.sides(sequence.queries, sequence.keys)
            first_slot = call.slots.first(index, cut.start)
            block, num_blocks = slot - first_slot, ceil_div(cut.length, self.tiling.size)
            if cutlass.const_expr(self.tiling.in_order):
                # Lengths that overlap could hide the first blocks, which the others wait for.
                if self._sequence_of(call, first_slot) != index:
                    num_blocks = Int32(0)
            cost = Int32(0)
            if block >= 0 and block < num_blocks:
                cost = self.tiling.cost(self._window(call, sequence), block, call.num_splits)
                longest_shared = maximum(longest_shared, rows.length)
                if block == 0:
                    shared += rows.length
            store_row(call.pairs, slot, (index, block, cost, 0))
            work += cost
            longest = maximum(longest, cost)
        work, shared = (cute.arch.warp_redux_sync(x, "add") for x in (work, shared))
        longest, longest_shared = (
            cute.arch.warp_redux_sync(x, "max") for x in (longest, longest_shared)
        )
        if thread % WARP == 0:
            cute.arch.atomic_add(totals.iterator, work)
            cute.arch.atomic_max(totals.iterator + 1, longest)
            cute.arch.atomic_add(totals.iterator + 2, shared)
            cute.arch.atomic_max(totals.iterator + 3, longest_shared)

    def _window(self, call: ListArguments, sequence: Sequence) -> Window:
        bounds = call.window_left, call.window_right
        return sequence.window(self.tiling.mask, *bounds, call.rows_per_query)

    @cute.jit
    def _sequence_of(self, call: ListArguments, slot) -> Int32:
        """The last sequence whose first slot is not behind this one."""
        spans, _ = self.tiling.sides(call.sequences.queries, call.sequences.keys)
        low, high = Int32(0), call.sequences.count - 1
        while low < high:
            middle = (low + high + 1) // 2
            if call.slots.first(middle, spans[middle].start) <= slot:
                low = middle
            else:
                high = middle - 1
        return low

    @cute.jit
    def _classify(self, call: ListArguments, rounds: Rounds, thread):
        for slot in cutlass.range(thread, call.slots.count, THREADS, unroll=1):
            index, block, cost, _ = load_row(call.pairs, slot)
            rank = cost
            if cutlass.const_expr(self.tiling.has_rank):
                rank = self.tiling.rank(self._window(call, call.sequences[index]), block)
            cost_class = rounds.class_of(rank)
            if cost == 0:
                cost_class = Int32(CLASSES)
            call.pairs[slot, 3] = cost_class

    @cute.jit
    def _count(self, call: ListArguments, rounds: Rounds, in_class: cute.Tensor, cost_class, lane):
        """A warp counts its class in every chunk."""
        for chunk in cutlass.range(rounds.num_chunks, unroll=1):
            first, end = self._slots_of(call, rounds, chunk)
            count = Int32(0)
            for base in cutlass.range(first, end, WARP, unroll=1):
                count += cute.arch.popc(self._members(call, base + lane, end, cost_class))
            in_class[chunk, cost_class] = count

    @cute.jit
    def _sort(self, call: ListArguments, rounds: Rounds, in_class: cute.Tensor, cost_class, lane):
        """A warp puts its class of every chunk behind those that are longer."""
        for chunk in cutlass.range(rounds.num_chunks, unroll=1):
            first, end = self._slots_of(call, rounds, chunk)
            longer = cutlass.select_(lane < cost_class, in_class[chunk, lane], Int32(0))
            position = first + cute.arch.warp_redux_sync(longer, "add")
            for base in cutlass.range(first, end, WARP, unroll=1):
                slot = base + lane
                members = self._members(call, slot, end, cost_class)
                if (members >> lane) & 1 == 1:
                    place = position + _before(members, lane)
                    call.order[place, 0] = slot
                    call.order[place, 1] = call.pairs[slot, 2]
                position += cute.arch.popc(members)

    def _slots_of(self, call: ListArguments, rounds: Rounds, chunk):
        first = chunk * rounds.slots_per_chunk
        return first, minimum(first + rounds.slots_per_chunk, call.slots.count)

    def _members(self, call: ListArguments, slot, end, cost_class) -> Int32:
        """Which lanes' slots hold a pair of the class."""
        is_member = call.pairs[minimum(slot, end - 1), 3] == cost_class
        return cute.arch.vote_ballot_sync((slot < end) & is_member)

    @cute.jit
    def _deal(
        self,
        call: ListArguments,
        rounds: Rounds,
        in_class: cute.Tensor,
        begins: cute.Tensor,
        num_items: cute.Tensor,
        lane,
    ):
        """By one warp, whose lanes have a few neighbouring CTAs each."""
        num_ctas = self._num_ctas(call)
        hands = Hands.empty(self.tiling.max_ctas, num_ctas, lane)
        items = Int32(0)
        for chunk in cutlass.range(rounds.num_chunks, unroll=1):
            pairs = in_class[chunk, lane]
            num_pairs = cute.arch.warp_redux_sync(pairs, "add")
            for group in cutlass.range(rounds.num_groups, unroll=1):
                first_head = group * rounds.heads_per_group
                heads = minimum(call.num_heads - first_head, rounds.heads_per_group)
                first_pair = chunk * rounds.slots_per_chunk
                classes = cute.arch.vote_ballot_sync(pairs > 0)
                while classes != 0:
                    cost_class = cute.arch.popc((classes & -classes) - 1)  # the lowest bit set
                    is_later = lane >= Run.end_class(cost_class)
                    is_dealt = (lane < cost_class) | is_later
                    count = cutlass.select_(is_dealt, Int32(0), pairs)
                    count = cute.arch.warp_redux_sync(count, "add")
                    sizes = count, first_head, heads, num_pairs * heads, num_ctas
                    run = Run.of(cost_class, *sizes)
                    deal(call, run, first_pair, items, hands)
                    items += run.num_items
                    first_pair += count
                    classes = cute.arch.vote_ballot_sync((pairs > 0) & is_later)
        num_items[0] = items
        hands.fill_begins(begins)

    @cute.jit
    def _write_in_order(self, call: ListArguments, rounds: Rounds, in_class: cute.Tensor, thread):
        """Round after round, a pair's heads together: no CTA has a tile yet."""
        tiles = call.tiles()
        group = call.num_heads // call.num_heads_kv
        position = Int32(0)
        for chunk in cutlass.range(rounds.num_chunks, unroll=1):
            num_pairs = cute.arch.warp_redux_sync(in_class[chunk, thread % WARP], "add")
            first_pair = chunk * rounds.slots_per_chunk
            for i in cutlass.range(rounds.num_groups, unroll=1):
                first_head = i * rounds.heads_per_group
                heads = minimum(call.num_heads - first_head, rounds.heads_per_group)
                for tile in cutlass.range(thread, num_pairs * heads, THREADS, unroll=1):
                    pair = tile // heads
                    head = first_head + tile - pair * heads
                    index, block, _, _ = load_row(call.pairs, call.order[first_pair + pair, 0])
                    entry = (index, block, head, head // group)
                    store_row(tiles.entries, position + tile, entry)
                position += num_pairs * heads
        # A static schedule that reads this list finds all tiles with CTA 0.
        for i in cutlass.range(thread, MAX_CTAS + 1, THREADS, unroll=1):
            tiles.begins[i] = cutlass.select_(i == 0, Int32(0), position)
        if thread == 0:
            store_row(tiles.entries, position, (0, 0, 0, 0))  # is read, but no tile

    @cute.jit
    def _write(self, call: ListArguments, begins: cute.Tensor, num_items, thread):
        tiles = call.tiles()
        for i in cutlass.range(thread, MAX_CTAS + 1, THREADS, unroll=1):
            tiles.begins[i] = begins[i]
        if thread == 0:
            store_row(tiles.entries, begins[MAX_CTAS], (0, 0, 0, 0))  # is read, but no tile
        group = call.num_heads // call.num_heads_kv
        for item in cutlass.range(thread, num_items, THREADS, unroll=1):
            position, cta, first_tile, heads = load_row(call.items, item)
            slot = first_tile // call.num_heads
            first_head = first_tile - slot * call.num_heads
            index, block, _, _ = load_row(call.pairs, slot)
            for i in cutlass.range(heads, unroll=1):
                head = first_head + i
                entry = (index, block, head, head // group)
                store_row(tiles.entries, begins[cta] + position + i, entry)


def _before(members, lane):
    """How many of the members are in lower lanes."""
    return cute.arch.popc(members & ((1 << lane) - 1))
