"""A consumer warpgroup of the forward kernel: S = Q K^T, softmax, O += P V for 64 query rows."""

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import warpgroup

from ...barriers import WarpgroupTurn
from ...scores import Scores
from ...softmax import OnlineSoftmax


@cute.jit
def attend(
    frag: Any,
    scores: Scores,
    softmax: OnlineSoftmax,
    turn: WarpgroupTurn,
    k: Any,
    v: Any,
    blocks: Any,
    keep_last_key: cutlass.Constexpr,
    meanwhile: Callable,
):
    """One query tile up to its last P; O += P V of the last block remains (accumulate_last).

    With keep_last_key the slot of the last K block is not released.  meanwhile() runs beside the
    first product.  One wgmma.fence serves both products of a step: what they use is ready by then.
    """
    softmax.start()
    frag.start()
    fetched = scores.fetch(blocks.n_max - 1, is_masked=True)
    key = k.wait_and_advance()
    warpgroup.fence()
    frag.issue_scores(key.index)
    meanwhile()
    warpgroup.wait_group(0)
    _release(key, keep_last_key, blocks.count == 1)
    frag.receive_scores()
    scores.apply(frag.acc_S, fetched, blocks.n_max - 1, is_masked=True)
    softmax.move(frag.acc_S, None)
    moves = cutlass.Boolean(False)

    for phase in blocks.phases():
        n_block = phase.n_end - 1
        while n_block >= phase.n_begin:
            if moves:
                softmax.move(frag.acc_S, frag.acc_O)
            moves = cutlass.Boolean(False)
            # Steps that move no maximum, which is nearly all of them, stay in this loop.
            while n_block >= phase.n_begin and not moves:
                fetched = scores.fetch(n_block, phase.is_masked)
                softmax.exponentiate(frag.acc_S)
                frag.convert()
                key = k.wait_and_advance()
                value = v.wait_and_advance()
                turn.wait()
                warpgroup.fence()
                frag.issue_scores(key.index)
                frag.issue_output(value.index, n_block + 1)
                turn.pass_on()
                warpgroup.wait_group(1)
                _release(key, keep_last_key, n_block == blocks.n_min)
                frag.receive_scores()
                moves = scores.apply(frag.acc_S, fetched, n_block, phase.is_masked)
                warpgroup.wait_group(0)
                frag.add_output(value.index)
                value.release()
                n_block -= 1

    if moves:
        softmax.move(frag.acc_S, frag.acc_O)
    softmax.exponentiate(frag.acc_S)
    frag.convert()
    return k, v


@cute.jit
def _release(key: Any, keep_last: cutlass.Constexpr, is_last):
    if cutlass.const_expr(keep_last):
        if not is_last:
            key.release()
    else:
        key.release()


@cute.jit
def accumulate_last(
    frag: Any, v: Any, n_block: Any, meanwhile: Callable, keep_value: cutlass.Constexpr
):
    """O += P V of the tile's last block; meanwhile() is computed beside it and returned.

    With keep_value the slot of that V block is not released.
    """
    value = v.wait_and_advance()
    warpgroup.fence()
    frag.issue_output(value.index, n_block)
    result = meanwhile()
    warpgroup.wait_group(0)
    frag.add_output(value.index)
    if cutlass.const_expr(not keep_value):
        value.release()
    return v, result
