"""Bytes in registers -> 16 bits in registers: every value of e4m3 is one of fp16 and of bf16."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

UNPACK = "cvt.rn.f16x2.e4m3x2 {$w0}, low; cvt.rn.f16x2.e4m3x2 {$w1}, high;"


def widened(source: cute.Tensor, dtype: type) -> cute.Tensor:
    """e4m3 registers -> 16-bit registers in the same order."""
    target = cute.make_rmem_tensor(cute.size(source), dtype)
    words, pairs = cute.recast_tensor(source, Int32), cute.recast_tensor(target, Int32)
    for i in range(cute.size(words)):
        halves = cute.arch.inline_ptx(
            f"{{ .reg .b16 low, high; mov.b32 {{low, high}}, {{$r0}}; {UNPACK} }}",
            write_only_types=[Int32, Int32],
            read_only_args=[words[i]],
        )
        for j, half in enumerate(halves):
            pairs[2 * i + j] = half if dtype is cutlass.Float16 else _to_bf16(half)
    return target


def _to_bf16(pair: Int32) -> Int32:
    """Two fp16 -> two bf16, exact for what came of e4m3."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 low, high; .reg .f32 a, b; mov.b32 {low, high}, {$r0};"
        " cvt.f32.f16 a, low; cvt.f32.f16 b, high; cvt.rn.bf16x2.f32 {$w0}, b, a; }",
        write_only_types=[Int32],
        read_only_args=[pair],
    )
