"""The smallest kernel that follows the protocol of fa3.jit: out = factor * x, quick to compile."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor


@dataclass(frozen=True)
class TinySignature:
    negate: bool = False


@dataclass(frozen=True)
class TinyConfig:
    threads: int = 32


class Scale:
    def __init__(self, signature: TinySignature, config: TinyConfig):
        self.signature = signature
        self.config = config

    def example_args(self) -> tuple:
        rows, columns = cute.sym_int32(), cute.sym_int32()
        x, out = (
            make_fake_tensor(BFloat16, (rows, columns), (cute.sym_int64(divisibility=8), 1))
            for _ in range(2)
        )
        return x, out, Float32(1.0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, mX: cute.Tensor, mOut: cute.Tensor, factor: Float32, stream):
        self.kernel(mX, mOut, factor).launch(
            grid=(mX.shape[0], 1, 1), block=(self.config.threads, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mOut: cute.Tensor, factor: Float32):
        row, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        if cutlass.const_expr(self.signature.negate):
            factor = -factor
        for column in range(thread, mX.shape[1], self.config.threads):
            mOut[row, column] = (mX[row, column].to(Float32) * factor).to(BFloat16)
