"""Microseconds of host time per call of an already compiled kernel.

    python -m perf.host_overhead           on a Hopper GPU: the whole call, and its parts
    python -m perf.host_overhead --stub    anywhere: the Python of fa3 alone, launch left out

A call is timed from Python's side, without waiting for the GPU. Batches are short enough for the
launch queue, which is drained between them; the median over batches is printed.
"""

import argparse
import statistics
import time

import torch

import fa3
from fa3 import ops
from fa3.call import lengths
from fa3.launch import counters

from .sweep import hopper

BATCH = 200  # calls between two synchronisations; the launch queue holds more
BATCHES = 100
SHAPE = (1, 64, 2, 64)  # b, s, h, d: a kernel that is over before the next call comes


def microseconds(call, synchronize) -> float:
    """Median over batches of the mean time of a call."""
    # without a launch nothing waits, and CPU time does not see other processes
    clock = time.thread_time if synchronize is _nothing else time.perf_counter
    for _ in range(BATCH):
        call()
    times = []
    for _ in range(BATCHES):
        synchronize()
        start = clock()
        for _ in range(BATCH):
            call()
        times.append((clock() - start) / BATCH)
    synchronize()
    return 1e6 * statistics.median(times)


def _nothing(*arguments, **options) -> None:
    pass


def _counters_of(device: torch.device):
    """As of a GPU: CUDA's part in it are three calls, which do next to nothing."""
    cuda = counters.Runtime(lambda: None, lambda: False, lambda index: 7)
    return counters.Pool(device, cuda).take


def rows(device: torch.device, stub: bool):
    """(what, microseconds), each measured on its own."""
    synchronize = _nothing if stub else torch.cuda.synchronize
    q, k, v = (torch.randn(SHAPE, device=device).bfloat16() for _ in range(3))

    def attention():
        fa3.flash_attn_func(q, k, v, causal=True)

    packed = [x.flatten(0, 1) for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, 20, 64], dtype=torch.int32, device=device)

    def ragged():
        fa3.flash_attn_varlen_func(*packed, cu_seqlens, cu_seqlens, 64, 64, causal=True)

    def operator():
        torch.ops.fa3.forward(q, k, v, None, True)

    if not stub:
        yield "flash_attn_func", microseconds(attention, synchronize)
        yield "flash_attn_varlen_func", microseconds(ragged, synchronize)
        yield "torch.ops.fa3.forward", microseconds(operator, synchronize)
    kernel_of, check_values = ops._kernel_of, lengths.check_values
    take = (_counters_of if stub else counters.of)(device)  # of a dynamic schedule

    def stubbed(problem, *_):
        counter = None if problem.sequences.is_ragged else take
        return lambda *arguments: None, 1, None, counter, None

    ops._kernel_of = stubbed
    lengths.check_values = _nothing  # of CPU tensors, whose lengths can be read at once
    ops.plan_of.cache_clear()
    try:
        yield "flash_attn_func without the launch", microseconds(attention, synchronize)
        yield "flash_attn_varlen_func without the launch", microseconds(ragged, synchronize)
        yield "torch.ops.fa3.forward without the launch", microseconds(operator, synchronize)

        def unseen():
            ops.plan_of.cache_clear()
            attention()

        def unseen_ragged():
            ops.plan_of.cache_clear()
            ragged()

        yield "flash_attn_func without the launch, new shape", microseconds(unseen, synchronize)
        yield (
            "flash_attn_varlen_func without the launch, new shape",
            microseconds(unseen_ragged, synchronize),
        )
    finally:
        ops._kernel_of, lengths.check_values = kernel_of, check_values
        ops.plan_of.cache_clear()
    yield (
        "  of which allocating out and lse",
        microseconds(
            lambda: (q.new_empty(*SHAPE), q.new_empty(1, 2, 64, dtype=torch.float32)), synchronize
        ),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stub", action="store_true", help="leave the launch out; needs no GPU")
    arguments = parser.parse_args()
    if not hopper() and not arguments.stub:
        print(
            "no GPU of compute capability 9.0 here, so nothing was measured (--stub: Python only)"
        )
        return
    if arguments.stub:
        device = torch.device("cpu")
        print("Python only, CPU tensors, nothing is launched: not the time of a call on a GPU")
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for what, time_us in rows(device, arguments.stub):
        print(f"{time_us:8.2f} us  {what}", flush=True)


if __name__ == "__main__":
    main()
