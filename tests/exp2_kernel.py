"""A kernel that follows the protocol of fa3.jit: out = 2^x by fa3.kernels.exp2."""

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from fa3.kernels.exp2 import exp2

THREADS = 128


class Exp2:
    def __init__(self, signature, config):
        pass

    def example_args(self) -> tuple:
        length = cute.sym_int32()
        x, out = (make_fake_tensor(Float32, (length,), (1,)) for _ in range(2))
        return x, out, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, mX: cute.Tensor, mOut: cute.Tensor, stream):
        blocks = (mX.shape[0] + THREADS - 1) // THREADS
        self.kernel(mX, mOut).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mOut: cute.Tensor):
        i = THREADS * cute.arch.block_idx()[0] + cute.arch.thread_idx()[0]
        if i < mX.shape[0]:
            mOut[i] = exp2(mX[i])
