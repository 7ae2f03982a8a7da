"""The tile list of a ragged batch: which CTA computes which tiles, in which order.

Lengths are known on the device only, so one CTA deals the tiles there, ahead of the forward kernel:

    weigh    the cost of every pair (sequence, m_block): its key blocks, and a constant
    rounds   chunks of pairs by groups of heads, whose K and V fit in L2 together
    sort     a round's pairs by classes of cost, longest first
    deal     round after round, the next tiles go to the CTAs that have least to do, so to those
             that would be free first: list scheduling (LPT in a round)
    write    the tiles of a CTA, one after another

No order depends on timing: the same lengths get the same list.
"""

import functools
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint64
from cutlass.memory import SmemAllocator

from ..arithmetic import ceil_div, maximum, minimum
from ..blocks import BlockRange
from ..scheduler import ENTRY, MAX_CTAS, TileList
from ..signature import MaskKind
from .rounds import CLASSES, MAX_CHUNKS, Memory, Rounds, Run, Slots, Totals

WARP = 32
THREADS = CLASSES * WARP  # a warp sorts a class
FIRST_AND_LAST = 3  # what a tile costs besides its key blocks, in halves of a block
CTAS_PER_LANE = MAX_CTAS // WARP
BANDS = 8
NEVER_FREE = 1 << 30


@dataclass(frozen=True)
class ListArguments:
    """What a list is made for."""

    sequences: Any  # of the call: [b], count
    slots: Slots
    num_heads: Any
    num_heads_kv: Any
    window_left: Any
    window_right: Any
    max_ctas: Any  # of the forward kernel, before TileList.count limits them
    keys_in_l2: Any  # L2_BUDGET // bytes of K and V of one key and head
    memory: cute.Tensor  # int32, `capacity`

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
        """By slot: batch, m_block, cost (0: none), class of cost."""
        return self._table(self.places.pairs, self.slots.count, ENTRY)

    @property
    def order(self) -> cute.Tensor:
        """Slot and cost; from each chunk's first slot on its pairs, longest first."""
        return self._table(self.places.order, self.slots.count, 2)

    def _table(self, offset, rows, columns: int) -> cute.Tensor:
        layout = cute.make_layout((rows, columns), stride=(columns, 1))
        return cute.make_tensor(self.memory.iterator + offset, layout)


@dataclass(frozen=True)
class Hands:
    """What a lane's CTAs have been dealt: registers, by CTA."""

    lane: Any
    loads: cute.Tensor  # sums of costs
    tiles: cute.Tensor  # how many

    @staticmethod
    def empty(call: ListArguments, lane) -> "Hands":
        hands = Hands(lane, *(cute.make_rmem_tensor(CTAS_PER_LANE, Int32) for _ in range(2)))
        for i in range(CTAS_PER_LANE):
            is_cta = hands.first_cta + i < call.num_ctas
            hands.loads[i] = cutlass.select_(is_cta, Int32(0), Int32(NEVER_FREE))
            hands.tiles[i] = 0
        return hands

    @property
    def first_cta(self):
        return self.lane * CTAS_PER_LANE

    def places(self, cost) -> tuple[list, Int32]:
        """Of each CTA among those that are served next, and how many these are.

        All that have less than the one with least would have after an item of this cost are served,
        by bands of an eighth of the cost, in a band by their numbers; the others' places lie
        behind all items.  Eight bytes of a word count the CTAs in each band.
        """
        loads = [self.loads[i] for i in range(CTAS_PER_LANE)]
        least = cute.arch.warp_redux_sync(functools.reduce(minimum, loads), "min")
        ends = [least + (cost * band >> 3) for band in range(1, BANDS + 1)]
        shifts, ones = [], []
        for load in loads:
            band = sum(cutlass.select_(load < end, Int32(0), Int32(8)) for end in ends)
            ones.append(cutlass.select_(load < ends[-1], Uint64(1), Uint64(0)))
            shifts.append(minimum(band, 8 * (BANDS - 1)).to(Uint64))
        own = sum((one << shift for one, shift in zip(ones, shifts, strict=True)), Uint64(0))
        up_to = _scan(own, self.lane)
        counts = cute.arch.shuffle_sync(up_to, WARP - 1) * Uint64(0x0101010101010101)
        before = (counts << Uint64(8)) + up_to - own
        places = []
        for one, shift in zip(ones, shifts, strict=True):
            place = (before >> shift).to(Int32) & 255
            places.append(cutlass.select_(one == 1, place, Int32(NEVER_FREE)))
            before += one << shift
        return places, (counts >> Uint64(56)).to(Int32)


class ListTiles:
    """The kernel that fills a TileList, for one kind of mask and one size of tiles."""

    def __init__(self, mask: MaskKind, tile_m: int, tile_n: int):
        self.mask = mask
        self.tile_m = tile_m
        self.tile_n = tile_n

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
        begins = smem.allocate_tensor(Int32, cute.make_layout(MAX_CTAS))
        num_items = smem.allocate_tensor(Int32, cute.make_layout(1))

        if thread < 4:
            totals[thread] = 0
        cute.arch.sync_threads()
        self._weigh(call, totals, thread)
        cute.arch.sync_threads()
        rounds = Rounds.of(
            Totals(*(totals[i] for i in range(4))),
            call.slots.count,
            call.num_heads,
            call.num_heads_kv,
            call.num_ctas,
            call.keys_in_l2,
        )
        self._classify(call, rounds, thread)
        cute.arch.sync_threads()
        self._count(call, rounds, in_class, warp, lane)
        cute.arch.sync_threads()
        self._sort(call, rounds, in_class, warp, lane)
        cute.arch.sync_threads()
        if warp == 0:
            self._deal(call, rounds, in_class, begins, num_items, lane)
        cute.arch.sync_threads()
        self._write(call, begins, num_items[0], thread)

    @cute.jit
    def _weigh(self, call: ListArguments, totals: cute.Tensor, thread):
        """Fill the pairs, but for their class, and the Totals."""
        work, longest, keys, longest_keys = Int32(0), Int32(0), Int32(0), Int32(0)
        for slot in cutlass.range(thread, call.slots.count, THREADS, unroll=1):
            index = self._sequence_of(call, slot)
            sequence = call.sequences[index]
            m_block = slot - call.slots.first(index, sequence.queries.start)
            cost = Int32(0)
            if m_block >= 0 and m_block < ceil_div(sequence.s_q, self.tile_m):
                window = sequence.window(self.mask, call.window_left, call.window_right)
                blocks = BlockRange.of(window, m_block, tile_m=self.tile_m, tile_n=self.tile_n)
                cost = 2 * blocks.count + FIRST_AND_LAST
                longest_keys = maximum(longest_keys, sequence.s_k)
                if m_block == 0:
                    keys += sequence.s_k
            _store(call.pairs, slot, (index, m_block, cost, 0))
            work += cost
            longest = maximum(longest, cost)
        work, keys = (cute.arch.warp_redux_sync(x, "add") for x in (work, keys))
        longest, longest_keys = (
            cute.arch.warp_redux_sync(x, "max") for x in (longest, longest_keys)
        )
        if thread % WARP == 0:
            cute.arch.atomic_add(totals.iterator, work)
            cute.arch.atomic_max(totals.iterator + 1, longest)
            cute.arch.atomic_add(totals.iterator + 2, keys)
            cute.arch.atomic_max(totals.iterator + 3, longest_keys)

    @cute.jit
    def _sequence_of(self, call: ListArguments, slot) -> Int32:
        """The last sequence whose first slot is not behind this one."""
        low, high = Int32(0), call.sequences.count - 1
        while low < high:
            middle = (low + high + 1) // 2
            if call.slots.first(middle, call.sequences.queries[middle].start) <= slot:
                low = middle
            else:
                high = middle - 1
        return low

    @cute.jit
    def _classify(self, call: ListArguments, rounds: Rounds, thread):
        for slot in cutlass.range(thread, call.slots.count, THREADS, unroll=1):
            cost = call.pairs[slot, 2]
            cost_class = rounds.class_of(cost)
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
        hands = Hands.empty(call, lane)
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
                    sizes = count, first_head, heads, num_pairs * heads, call.num_ctas
                    run = Run.of(cost_class, *sizes)
                    self._deal_run(call, run, first_pair, items, hands)
                    items += run.num_items
                    first_pair += count
                    classes = cute.arch.vote_ballot_sync((pairs > 0) & is_later)
        num_items[0] = items
        self._begin(call, hands, begins)

    @cute.jit
    def _deal_run(self, call: ListArguments, run: Run, first_pair, first_item, hands: Hands):
        """The next items go, one each, to all CTAs that have less than the next would then have."""
        parts, per_part = run.parts, 1.0 / Float32(run.parts)
        pair, part, done = Int32(0), Int32(0), Int32(0)
        while done < run.num_items:
            places, count = hands.places(call.order[first_pair + pair, 1] * run.heads_at_once)
            dealt = []
            for place in places:
                # exact: a sum of few parts and CTAs is far from 2 ** 21
                ahead = ((part + place).to(Float32) + 0.5) * per_part
                ahead = ahead.to(Int32)
                slot, cost = _load(
                    call.order, first_pair + minimum(pair + ahead, run.num_pairs - 1)
                )
                dealt.append((place, slot, cost, *run.heads_of(part + place - ahead * parts)))
            for i, (place, slot, cost, head, heads) in enumerate(dealt):
                if done + place < run.num_items:
                    first_tile = slot * call.num_heads + head
                    entry = (hands.tiles[i], hands.first_cta + i, first_tile, heads)
                    _store(call.items, first_item + done + place, entry)
                    hands.tiles[i] += heads
                    hands.loads[i] += cost * heads
            done += count
            ahead = ((part + count).to(Float32) + 0.5) * per_part
            ahead = ahead.to(Int32)
            pair += ahead
            part += count - ahead * parts

    @cute.jit
    def _begin(self, call: ListArguments, hands: Hands, begins: cute.Tensor):
        """Where each CTA's tiles begin: after those of the CTAs before it."""
        listed = call.tiles()
        own = sum(hands.tiles[i] for i in range(CTAS_PER_LANE))
        begin = _scan(own, hands.lane) - own
        for i in cutlass.range_constexpr(CTAS_PER_LANE):
            begins[hands.first_cta + i] = begin
            listed.begins[hands.first_cta + i] = begin
            begin += hands.tiles[i]
        if hands.lane == WARP - 1:
            listed.begins[MAX_CTAS] = begin
            _store(listed.entries, begin, (0, 0, 0, 0))  # read past the last tile

    @cute.jit
    def _write(self, call: ListArguments, begins: cute.Tensor, num_items, thread):
        entries = call.tiles().entries
        group = call.num_heads // call.num_heads_kv
        for item in cutlass.range(thread, num_items, THREADS, unroll=1):
            position, cta, first_tile, heads = _load(call.items, item)
            slot = first_tile // call.num_heads
            first_head = first_tile - slot * call.num_heads
            index, m_block, _, _ = _load(call.pairs, slot)
            for i in cutlass.range(heads, unroll=1):
                head = first_head + i
                entry = (index, m_block, head, head // group)
                _store(entries, begins[cta] + position + i, entry)


def _before(members, lane):
    """How many of the members are in lower lanes."""
    return cute.arch.popc(members & ((1 << lane) - 1))


def _scan(value, lane):
    """Sum of this lane's and all lower lanes' values."""
    for bit in range(5):
        below = cute.arch.shuffle_sync_up(value, offset=1 << bit)
        value += cutlass.select_(lane >= 1 << bit, below, type(value)(0))
    return value


def _load(table: cute.Tensor, row) -> tuple:
    values = cute.make_rmem_tensor(table.shape[1], Int32)
    cute.autovec_copy(table[row, None], values)
    return tuple(values[i] for i in range(table.shape[1]))


def _store(table: cute.Tensor, row, values: tuple):
    fragment = cute.make_rmem_tensor(ENTRY, Int32)
    for i, value in enumerate(values):
        fragment[i] = value
    cute.autovec_copy(fragment, table[row, None])
