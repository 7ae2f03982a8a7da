"""How the sweep measures: interleaved rounds in rotated order, medians, warm clocks, a cold L2."""

import functools
import time
from collections.abc import Callable, Sequence

import torch

Sample = Callable[[Callable[[], object], int], list[float]]  # (call, how often) -> milliseconds

FLUSH_BYTES = 256 << 20  # more than any L2
MATMUL_SIZE = 8192
ROUND_MS = 20.0  # how long one backend runs in one round


class GpuTimer:
    """Milliseconds of single calls between two CUDA events, each after the L2 was overwritten.

    The overwriting also keeps the GPU busy while the host prepares the call.
    """

    def __init__(self):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object], repeats: int) -> list[float]:
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def matmul_call(dtype: torch.dtype, device: str = "cuda", size: int = MATMUL_SIZE):
    """(call, its floating-point operations): a square product of random matrices.

    Of e4m3 with bf16 results, and b column-major, the only way that it exists.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        product = functools.partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16)
    else:
        product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    return product, 2.0 * size**3


def warm_up(call: Callable[[], object], seconds: float) -> None:
    """Keep the GPU busy until its clocks have settled."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(10):
            call()
        torch.cuda.synchronize()


def rotated(names: Sequence[str], by: int) -> list[str]:
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int, sample: Sample
) -> dict[str, list[float]]:
    """Milliseconds of every call: each runs once per round, and a round starts one further on.

    A drift of the clocks so meets all of them alike, and nobody always follows the same neighbour.
    """
    names = list(calls)
    repeats = {}
    for name in names:
        estimate = min(sample(calls[name], 2))
        repeats[name] = int(min(max(ROUND_MS / max(estimate, 1e-3), 3), 50))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in rotated(names, turn):
            times[name] += sample(calls[name], repeats[name])
    return times
