"""List scheduling by one warp: each item goes to the CTA that would be free first.

A step deals many at once, one to every CTA that has less than the one with least would then have:
one by one, they would go to just these, but for what items differ in cost.
"""

import functools
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint64

from ..arithmetic import minimum
from ..ctas import MAX_CTAS
from .list_arguments import ListArguments, load_row, store_row
from .rounds import Run

WARP = 32
NEVER_FREE = 1 << 30


def bits_of_band(max_ctas: int) -> int:
    """That count so many CTAs."""
    return 8 if max_ctas < 1 << 8 else 9


def bands_of(max_ctas: int) -> int:
    """How many such counts a word of 64 bits has."""
    return 64 // bits_of_band(max_ctas)


@dataclass(frozen=True)
class Hands:
    """What a lane's CTAs, a few neighbours, have been dealt: in registers, by CTA."""

    max_ctas: cutlass.Constexpr[int]  # a multiple of WARP
    lane: Any
    loads: cute.Tensor  # sums of costs
    tiles: cute.Tensor  # how many

    @staticmethod
    def empty(max_ctas: int, num_ctas, lane) -> "Hands":
        sizes = 2 * [max_ctas // WARP]
        hands = Hands(max_ctas, lane, *(cute.make_rmem_tensor(n, Int32) for n in sizes))
        for i in range(hands.ctas_per_lane):
            is_cta = hands.first_cta + i < num_ctas
            hands.loads[i] = cutlass.select_(is_cta, Int32(0), Int32(NEVER_FREE))
            hands.tiles[i] = 0
        return hands

    @property
    def ctas_per_lane(self) -> int:
        return self.max_ctas // WARP

    @property
    def first_cta(self):
        return self.lane * self.ctas_per_lane

    def places(self, cost) -> tuple[list, Int32]:
        """Each CTA's place among those that get the next items, and how many these are.

        Those that have less come first, by bands of an eighth of the cost of an item (a seventh,
        for many CTAs), and in a band by their numbers.  The others' places lie behind all items.
        """
        bits, num_bands = bits_of_band(self.max_ctas), bands_of(self.max_ctas)
        loads = [self.loads[i] for i in range(self.ctas_per_lane)]
        least = cute.arch.warp_redux_sync(functools.reduce(minimum, loads), "min")
        above = [minimum(load - least, cost) for load in loads]
        per_cost = cute.arch.rcp_approx(cost.to(Float32))
        bands = [minimum(quotient(num_bands * x, per_cost), num_bands - 1) for x in above]
        shifts = [Uint64(bits * band) for band in bands]
        ones = [cutlass.select_(x < cost, Uint64(1), Uint64(0)) for x in above]

        # bits of each band count its CTAs; these bits are enough for all together
        own = sum((one << shift for one, shift in zip(ones, shifts, strict=True)), Uint64(0))
        up_to_own = scan(own, self.lane)
        counts = cute.arch.shuffle_sync(up_to_own, WARP - 1)
        up_to_band = counts * Uint64(sum(1 << bits * i for i in range(num_bands)))
        before = up_to_band - counts + up_to_own - own
        places = []
        for one, shift in zip(ones, shifts, strict=True):
            place = Int32(before >> shift) & (1 << bits) - 1
            places.append(cutlass.select_(one == 1, place, Int32(NEVER_FREE)))
            before += one << shift
        last = Int32(up_to_band >> Uint64(bits * (num_bands - 1)))
        return places, last & (1 << bits) - 1

    def fill_begins(self, begins: cute.Tensor):
        """Where each CTA's tiles begin in the list: after those of the CTAs before it."""
        own = sum(self.tiles[i] for i in range(self.ctas_per_lane))
        begin = scan(own, self.lane) - own
        for i in range(self.ctas_per_lane):
            begins[self.first_cta + i] = begin
            begin += self.tiles[i]
        end = cute.arch.shuffle_sync(begin, WARP - 1)
        for i in range(self.max_ctas, MAX_CTAS, WARP):
            begins[i + self.lane] = end
        begins[MAX_CTAS] = end


@cute.jit
def deal(call: ListArguments, run: Run, first_pair, first_item, hands: Hands):
    """Deal the items of a run, whose pairs lie from first_pair on in the order."""
    parts = run.parts
    per_part = cute.arch.rcp_approx(parts.to(Float32))
    done, pair, part = Int32(0), Int32(0), Int32(0)  # the next item is a part of a pair
    while done < run.num_items:
        places, count = hands.places(call.order[first_pair + pair, 1] * run.heads_at_once)
        items = []
        for place in places:
            ahead = quotient(part + place, per_part)
            row = first_pair + minimum(pair + ahead, run.num_pairs - 1)
            slot, cost = load_row(call.order, row)
            items.append((slot, cost, *run.heads_of(part + place - ahead * parts)))
        for i, (slot, cost, head, heads) in enumerate(items):
            if done + places[i] < run.num_items:
                entry = (hands.tiles[i], hands.first_cta + i, slot * call.num_heads + head, heads)
                store_row(call.items, first_item + done + places[i], entry)
                hands.tiles[i] += heads
                hands.loads[i] += cost * heads
        done += count
        ahead = quotient(part + count, per_part)
        pair += ahead
        part += count - ahead * parts


def quotient(n, reciprocal) -> Int32:
    """n // d of d's approximate reciprocal; exact for n < 2 ** 20."""
    return Int32((n.to(Float32) + 0.5) * reciprocal)


def scan(value, lane):
    """Sum of the values of all lanes up to this one."""
    for bit in range(5):
        below = cute.arch.shuffle_sync_up(value, offset=1 << bit)
        value += cutlass.select_(lane >= 1 << bit, below, type(value)(0))
    return value
