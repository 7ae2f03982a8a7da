"""How often a warp leaves the forward's steady loop to move a maximum, simulated in NumPy.

    python -m perf.moves [--keys 16384] [--warps 256] [--seed 0]

The kernel's speed rests on that being rare (docs/algorithm.md).  A step is one key block of one
warp, 16 query rows; it leaves the loop when any of its rows has a score that exceeds the row's
maximum, as of its last move, by 2^headroom.  The first block of a tile always does and is not
counted: it lies outside of the loop.
"""

import argparse
import math

import numpy as np

from fa3.kernels.headroom import HEADROOM_LOG2

ROWS = 16
DATA = ("normal", "outliers", "sink", "rising")


def scores(kind: str, rows: int, keys: int, head_dim: int, rng) -> np.ndarray:
    """(rows, keys) scaled scores in log2; keys in the order in which the kernel visits them."""
    q, k = rng.standard_normal((rows, head_dim)), rng.standard_normal((keys, head_dim))
    if kind == "outliers":  # FA3 paper, section 4.3: N(0, 1) + N(0, 100) with probability 0.001
        for x in (q, k):
            x += 10 * rng.standard_normal(x.shape) * (rng.random(x.shape) < 1e-3)
    s = q @ k.T / math.sqrt(head_dim)
    if kind == "sink":  # the first key of the sequence, visited last, draws half of the weight
        s[:, -1] = np.log(np.exp(s).sum(1))
    if kind == "rising":  # as bad as it gets: the kernel meets ever larger scores
        s += np.linspace(0, 50, keys)
    return s * math.log2(math.e)


def share_of_moves(s: np.ndarray, tile_n: int, headroom: float) -> float:
    """Of the steps after each warp's first one, those with a move."""
    maximum = s[:, :tile_n].max(1)
    moved = []
    for start in range(tile_n, s.shape[1], tile_n):
        top = s[:, start : start + tile_n].max(1)
        moves = top > maximum + headroom
        maximum = np.where(moves, top, maximum)
        moved.append(moves.reshape(-1, ROWS).any(1))
    return float(np.mean(moved))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m perf.moves", description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=16384)
    parser.add_argument("--warps", type=int, default=256)
    parser.add_argument("--tile-n", type=int, default=176)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    print(f"steps with a move, {options.keys} keys, {options.warps} warps, seed {options.seed}")
    for kind in DATA:
        rng = np.random.default_rng(options.seed)
        s = scores(kind, ROWS * options.warps, options.keys, options.head_dim, rng)
        shares = {
            dtype: share_of_moves(s, options.tile_n, headroom)
            for dtype, headroom in HEADROOM_LOG2.items()
        }
        print(f"{kind:9}", "  ".join(f"{dtype} {share:.3%}" for dtype, share in shares.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
