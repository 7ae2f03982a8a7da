"""A kernel with a register array that is indexed at run time, which puts it into local memory."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

ENTRIES = 16


@dataclass(frozen=True)
class Nothing:
    """Neither a signature nor a config has a choice here."""


class Permute:
    """out[i] = x[index[i]] for each thread's row, through an array per thread."""

    def __init__(self, signature: Nothing, config: Nothing):
        self.signature, self.config = signature, config

    def example_args(self) -> tuple:
        rows = cute.sym_int32()
        x, out = (make_fake_tensor(Float32, (rows, ENTRIES), (ENTRIES, 1)) for _ in range(2))
        index = make_fake_tensor(cutlass.Int32, (ENTRIES,), (1,))
        return x, index, out, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, mX: cute.Tensor, mIndex: cute.Tensor, mOut: cute.Tensor, stream):
        self.kernel(mX, mIndex, mOut).launch(grid=(1, 1, 1), block=(64, 2, 1), stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mIndex: cute.Tensor, mOut: cute.Tensor):
        row, _, _ = cute.arch.thread_idx()
        values = cute.make_rmem_tensor(ENTRIES, Float32)
        for i in cutlass.range_constexpr(ENTRIES):
            values[i] = mX[row, i]
        for i in range(ENTRIES):
            mOut[row, i] = values[mIndex[i]]
