"""One query tile: S = Q K^T, softmax, O += P V, block after block, for the rows of a warp."""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute

from ...blocks import BlockRange, Phase
from ...scores import Scores
from ...softmax import OnlineSoftmax
from ..copies import wait_for_all
from .load import Loads
from .products import Products


@dataclass(frozen=True)
class Rows:
    """What one row group's scores go through; acc_S and acc_O are those of Products.groups."""

    scores: Scores
    softmax: OnlineSoftmax


@cute.jit
def attend(products: Products, rows: tuple, loads: Loads, blocks: BlockRange):
    """A step whose rows move their maximum corrects y and O at once; nearly none does."""
    for group in rows:
        group.softmax.start()
    products.start()
    if cutlass.const_expr(products.plan.q_in_registers > 0):
        wait_for_all()
        products.keep()
    for phase, is_first in _phases(blocks):
        n_block = phase.n_end - 1
        while n_block >= phase.n_begin:
            stage = loads.stage(n_block)
            fetched = rows[0].scores.fetch(n_block, phase.is_masked)
            loads.before_scores(n_block, is_first)
            products.scores(stage)
            loads.before_softmax(n_block)
            moves = _apply(products, rows, fetched, n_block, phase.is_masked)
            if moves:
                for m in cutlass.range_constexpr(len(rows)):
                    group = products.groups[m]
                    rows[m].softmax.move(group.acc_S, group.acc_O, products.pair)
            for m in cutlass.range_constexpr(len(rows)):
                rows[m].softmax.exponentiate(products.groups[m].acc_S)
            products.convert()
            products.output(stage)
            n_block -= 1


def _apply(products: Products, rows: tuple, fetched: tuple, n_block, is_masked: bool):
    """S -> y; true (warp-uniform) if a row's maximum has to move."""
    moves = cutlass.Boolean(False)
    for group, part in zip(rows, products.groups, strict=True):
        moves = group.scores.apply(part.acc_S, fetched, n_block, is_masked) | moves
    return moves if products.pair is None else products.pair.any(moves)


def _phases(blocks: BlockRange) -> tuple[tuple[Phase, bool], ...]:
    """All blocks, the first one too, and which stretch has it."""
    first, *others = blocks.phases()
    if first.is_masked:
        found = (replace(first, n_end=blocks.n_max), *others)
    else:
        found = (Phase(blocks.n_max - 1, blocks.n_max, True), first, *others)
    return tuple((phase, i == 0) for i, phase in enumerate(found))
