"""A kernel of one's own on the emulator, here sums of rows: python docs/examples/own_kernel.py"""

import sys

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import from_dlpack

from fa3 import emulator


@cute.kernel
def _row_sums(x: cute.Tensor, out: cute.Tensor):
    row, lane = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
    total = cutlass.Float32(0)
    for column in range(lane, x.shape[1], 32):
        total += x[row, column]
    total = cute.arch.warp_reduction_sum(total)
    if lane == 0:
        out[row] = total


@cute.jit
def row_sums(x: cute.Tensor, out: cute.Tensor):
    _row_sums(x, out).launch(grid=[x.shape[0], 1, 1], block=[32, 1, 1])


emulator.install(*sys.argv[1:])  # before anything is compiled; sm_90a or as given, sm_80
x, out = torch.randn(40, 300), torch.zeros(40)
kernel = cute.compile(row_sums, from_dlpack(x), from_dlpack(out))


def run():
    kernel(from_dlpack(x), from_dlpack(out.zero_()))
    return [out]


(same,) = emulator.compare_schedules(run, range(4), checks=emulator.ALL_CHECKS)
torch.testing.assert_close(same, x.sum(1))
print("right, eagerly, late and in 4 random orders:", emulator.launches[-1]["kernel"])
