"""Into how many parts the keys are split, where the queries alone would not fill the machine.

Lengths live on the device, so what is known here are bounds from shapes. Plain arithmetic.
"""

from collections.abc import Callable

import torch

from ..call.problem import OUT_DTYPES, Problem
from ..kernels.config import FwdConfig
from . import dispatch, jit

COMBINE = "fa3.kernels.simple.combine:Combine"
ENOUGH = 0.85  # of what the best number of splits makes of the machine
# A tile's first and last products, and what partial results cost besides, in halves of a key block:
# as the list of ragged tiles counts them, and a launch and a trip through memory. Not measured.
TILE_COST = 3
COMBINE_COST = 8


def choose(num_tiles: int, num_blocks: int, num_ctas: int) -> int:
    """The smallest number of splits that is about as fast as the best one.

    num_tiles: without splits; num_blocks: of keys, of the longest tile.
    """
    if num_tiles == 0 or num_tiles >= num_ctas:
        return 1

    def cost(splits: int) -> int:
        waves = -(-num_tiles * splits // num_ctas)
        tile = 2 * -(-num_blocks // splits) + TILE_COST
        return waves * tile + (COMBINE_COST if splits > 1 else 0)

    costs = {n: cost(n) for n in range(1, max(1, min(num_blocks, num_ctas)) + 1)}
    best = min(costs.values())
    return next(n for n, x in costs.items() if x * ENOUGH <= best)


def of(problem: Problem, config: FwdConfig, num_ctas: int, num_splits: int, longest: tuple) -> int:
    """The number of splits that a call gets.

    num_splits: as asked for; more than there are blocks would change no bit. 0: to be chosen.
    longest: max_seqlen_q and max_seqlen_k, of which only the choice depends.
    """
    if num_splits:
        return min(num_splits, _num_blocks(problem, config, None))
    num_tiles = _num_tiles(problem, config.tile_m, longest[0])
    return choose(num_tiles, _num_blocks(problem, config, longest[1]), num_ctas)


def combine(out_dtype: torch.dtype, is_ragged: bool, target: dispatch.Target) -> Callable:
    """run(parts, part_lse, out, lse, cu_seqlens_q, seqused_q), compiled; see kernels/simple."""
    from ..kernels.simple.combine import CombineSignature  # imports the DSL, as the kernel does

    signature = CombineSignature(OUT_DTYPES[out_dtype], is_ragged)
    return jit.compile(COMBINE, signature, None, target.kind, target.arch)


def _num_tiles(problem: Problem, tile_m: int, longest: int | None) -> int:
    """At most."""
    rows = problem.s_q if longest is None else min(problem.s_q, longest)
    m_blocks = problem.batch * -(-rows // tile_m)
    if problem.sequences.q_is_packed:
        m_blocks = min(m_blocks, problem.s_q // tile_m + problem.batch)
    return m_blocks * problem.h_q


def _num_blocks(problem: Problem, config: FwdConfig, longest: int | None) -> int:
    """That a tile visits, at most."""
    keys = problem.s_k if longest is None else min(problem.s_k, longest)
    blocks = -(-keys // config.tile_n)
    mask = problem.mask
    if mask.kind == "local":
        seen = config.tile_m + mask.left + mask.right
        blocks = min(blocks, -(-seen // config.tile_n) + 1)
    return max(blocks, 1)
