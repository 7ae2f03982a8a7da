"""A warpgroup's accumulator: views of it by rows and columns, and its conversion to less bits."""

import cutlass
import cutlass.cute as cute


def rows_and_columns(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, N/8), 1, 1) -> (2, (2, N/8)): this thread's two rows by its columns.

    Element (c, r, j) of a wgmma accumulator is row 8 r + lane / 4 of the warp's 16 rows and column
    8 j + 2 (lane % 4) + c (PTX manual, "wgmma register fragment D").
    """
    (columns, rows, eights), _, _ = acc.shape
    (column_stride, row_stride, eight_stride), _, _ = acc.stride
    layout = cute.make_layout(
        (rows, (columns, eights)), stride=(row_stride, (column_stride, eight_stride))
    )
    return cute.make_tensor(acc.iterator, layout)


def column_of(index: int) -> int:
    """Column, less 2 (lane % 4), of a thread's index-th element in a row of rows_and_columns."""
    return 8 * (index // 2) + index % 2


def four_bytes(a, b, c, d, kind: str) -> cutlass.Int32:
    """Four fp32 -> four bytes of `kind` (e4m3 or e5m2), to nearest even, saturating.

    The first is the lowest byte.
    """
    return cute.arch.inline_ptx(
        "{ .reg .b16 low, high;"
        f" cvt.rn.satfinite.{kind}x2.f32 low, {{$r1}}, {{$r0}};"
        f" cvt.rn.satfinite.{kind}x2.f32 high, {{$r3}}, {{$r2}};"
        " mov.b32 {$w0}, {low, high}; }",
        write_only_types=[cutlass.Int32],
        read_only_args=[a, b, c, d],
    )


def convert(source: cute.Tensor, target: cute.Tensor):
    """fp32 registers -> 16-bit registers in the same order, two elements per instruction."""
    kind = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}[target.element_type]
    pairs = cute.recast_tensor(target, cutlass.Int32)
    for i in range(cute.size(pairs)):
        pairs[i] = cute.arch.inline_ptx(
            f"cvt.rn.{kind}.f32 {{$w0}}, {{$r1}}, {{$r0}};",
            write_only_types=[cutlass.Int32],
            read_only_args=[source[2 * i], source[2 * i + 1]],
        )
