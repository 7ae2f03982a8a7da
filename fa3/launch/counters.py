"""Counters of dynamic schedules (kernels/sm90/tile_queue.py): which tile the next CTA gets.

A launch finds its counter at 0 and leaves it there, so that launches that follow each other share
one. Those that may run at the same time must not:

    streams    each has a counter of its own. It is known by its handle; a stream that torch did not
               make may give that to another one, when its work is over and it is destroyed.
    graphs     a captured launch has a counter of its own, on whatever stream the graph is replayed:
               of a chunk that was zeroed ahead, and is never given back. Where that is used up, or
               was not made before the capture began, the graph itself zeroes one.
    emulator   every launch has a new one: a launch that ends with an error leaves none behind.
"""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IN_GRAPHS = 16_384  # captured launches of a GPU that have their counter in the chunk


class Runtime(NamedTuple):
    """What is asked of CUDA at each call."""

    device: Callable[[], int]  # the current one
    is_capturing: Callable[[], bool]  # its current stream
    stream: Callable[[int], int]  # of a device: the handle of the current one


@functools.cache
def of(device: torch.device) -> Callable[[], Tensor]:
    """take(): the counter, (1,) int32 on the device, of a launch on torch's current stream."""
    if device.type != "cuda":
        return functools.partial(torch.zeros, 1, dtype=torch.int32, device=device)
    c = torch._C
    cuda = Runtime(c._cuda_getDevice, c._cuda_isCurrentStreamCapturing, c._cuda_getCurrentRawStream)
    return Pool(device, cuda).take


class Pool:
    """The counters of one GPU."""

    def __init__(self, device: torch.device, cuda: Runtime):
        self._device, self._index, self._cuda = device, device.index, cuda
        self._of_stream: dict[int, Tensor] = {}
        self._chunk: Tensor | None = None
        self._used = 0  # of the chunk
        self._lock = threading.Lock()

    def take(self) -> Tensor:
        device, is_capturing, stream = self._cuda
        if device() != self._index:
            with torch.cuda.device(self._index):
                return self.take()
        if is_capturing():
            return self._of_graph()
        counter = self._of_stream.get(stream(self._index))
        return self._new() if counter is None else counter

    def _new(self) -> Tensor:
        """Of the current stream, which zeroes it ahead of the launch."""
        with self._lock:
            if self._chunk is None:
                # Copied from the host, which waits: graphs that use it may run on any stream.
                self._chunk = torch.zeros(IN_GRAPHS, dtype=torch.int32, device="cpu").to(
                    self._device
                )
            return self._of_stream.setdefault(self._cuda.stream(self._index), self._zeroed())

    def _of_graph(self) -> Tensor:
        with self._lock:
            if self._chunk is None or self._used == IN_GRAPHS:
                return self._zeroed()
            self._used += 1
            return self._chunk[self._used - 1 : self._used]

    def _zeroed(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=self._device)
