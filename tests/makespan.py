"""How long a launch takes whose tiles cost what they cost, and a little more or less: simulated."""

import heapq
import random
from collections.abc import Callable, Sequence

AHEAD = 2.0  # blocks that are loaded, and not yet multiplied, when a CTA asks for its next tile


class Jitter:
    """Factors of the time of a tile: of its SM, for a whole launch, and of the tile alone."""

    def __init__(self, of_ctas: float, of_tiles: float, seed: int, num_ctas: int):
        self._random, self._of_tiles = random.Random(seed), of_tiles
        self._ctas = [self._random.lognormvariate(0.0, of_ctas) for _ in range(num_ctas)]

    def time(self, cta: int, cost: float) -> float:
        return cost * self._ctas[cta] * self._random.lognormvariate(0.0, self._of_tiles)


def static(costs_by_cta: Sequence[Sequence[float]], time: Callable[[int, float], float]) -> float:
    """Every CTA has its own tiles."""
    return max(sum(time(cta, cost) for cost in costs) for cta, costs in enumerate(costs_by_cta))


def dynamic(
    costs: Sequence[float], num_ctas: int, time: Callable[[int, float], float], ahead: float = AHEAD
) -> float:
    """The next tile goes to the CTA that asks first, a little before its last one is done."""
    grid = min(num_ctas, len(costs))
    asking: list[tuple[float, int, float]] = []  # when it asks, CTA, when it is done

    def start(cta: int, cost: float, begin: float) -> None:
        taken = time(cta, cost)
        end = begin + taken
        heapq.heappush(asking, (end - taken * min(ahead / cost, 1.0), cta, end))

    for cta in range(grid):
        start(cta, costs[cta], 0.0)
    for cost in costs[grid:]:
        _, cta, end = heapq.heappop(asking)
        start(cta, cost, end)
    return max(end for _, _, end in asking)
