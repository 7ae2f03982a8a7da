"""Matrix products of warps: mma.sync m16n8k16 with operands that ldmatrix reads.

A warp's accumulator of 16 rows is kept as wgmma's is for one of its four warps, as
((2, 2, N/8), 1, 1): the instructions' fragments agree, so that softmax, mask and scores see the
same rows and columns.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warp

from .config import ROWS as ROWS
from .copies import CHUNK, TileLayout, kept


def warp_mma(element: type) -> cute.MmaAtom:
    return cute.make_mma_atom(warp.MmaF16BF16Op(element, Float32, (16, 8, 16)))


def accumulator(columns: int) -> cute.Tensor:
    """((2, 2, columns / 8), 1, 1) fp32 registers: 16 rows of a warp."""
    return cute.make_rmem_tensor(((2, 2, columns // 8), 1, 1), Float32)


def operand(keys: int, element: type) -> cute.Tensor:
    """((2, 2, 2), 1, keys / 16): an accumulator's elements in their order, as an operand A."""
    return cute.make_rmem_tensor(((2, 2, 2), 1, keys // 16), element)


def as_fragment(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, N/8), 1, 1) -> ((2, 2), 1, N/8), as mma.sync sees it."""
    columns = cute.size(acc) // 4
    layout = cute.make_layout(((2, 2), 1, columns), stride=((1, 2), 0, 4))
    return cute.make_tensor(acc.iterator, layout)


@dataclass(frozen=True)
class Lanes:
    """Where the lanes of a warp read or write in column blocks of so many columns, in bytes.

    first_chunk_of() moves that to other columns by exclusive or.
    """

    a: Int32  # 16 x 16 elements for ldmatrix: rows of the first 8 columns, then of the others
    b: Int32  # the same, 8 rows' (k, k + 8) and then those of the next 8
    result: Int32  # two elements of each lane, of 8 x 8 that an accumulator holds

    @staticmethod
    def of(columns: int, lane) -> "Lanes":
        block = TileLayout(0, columns)
        return Lanes(
            kept(2 * block.offset(lane % 16, lane // 16)),
            kept(2 * block.offset(lane // 16 * 8 + lane % 8, lane // 8 % 2)),
            kept(2 * (block.offset(lane // 4, 0) + 2 * (lane % 4))),
        )


@dataclass(frozen=True)
class SharedOperand:
    """An operand in shared memory, as ldmatrix reads 16 x 16 elements of it: four 8 x 8 matrices.

    Lane l holds the address of row l % 8 of matrix l / 8.  A column block's chunks are permuted by
    exclusive or (copies.py), so the address 2 k chunks further is `base ^ 32 k`; all else that
    tells one load from another is a constant, and no instruction.
    """

    layout: TileLayout
    base: Int32  # the lane's address for the first 16 x 16 elements
    offset: Any = 0  # to be added

    @staticmethod
    def of(
        layout: TileLayout, pointer: cute.Pointer, lane, first_row=0, is_k: bool = False, part=0
    ) -> "SharedOperand":
        """is_k: the matrices' order is (k, k + 8) for 8 rows, then for the next 8; else the other.

        That is what makes a fragment of K; Q and V, which is transposed, take the other.
        part: 1 is the second half of each column block, 0 the first one, or all.
        """
        row, chunk = (lane // 16 * 8 + lane % 8, lane // 8 % 2) if is_k else (lane % 16, lane // 16)
        chunk = chunk + part * (layout.chunks // 2)
        base = kept(Int32(pointer.toint()) + 2 * layout.offset(first_row + row, chunk))
        return SharedOperand(layout, base)

    @staticmethod
    def beside(
        layout: TileLayout, pointer: cute.Pointer, lanes: Int32, first_row=0
    ) -> "SharedOperand":
        """One that shares what its lanes add with others; first_row: a multiple of 8."""
        return SharedOperand(layout, lanes, place(layout, pointer, first_row))

    def at(self, stage) -> "SharedOperand":
        step = stage * (2 * self.layout.elements)
        if isinstance(self.offset, int):
            return replace(self, base=self.base + step)
        return replace(self, offset=self.offset + step)

    def load(self, row: int, column: int, transpose: bool = False) -> list[Int32]:
        """The 16 x 16 elements from (row, column) on: 4 registers."""
        layout = self.layout
        block, chunk = column // layout.columns, column % layout.columns // CHUNK
        kind = ".trans" if transpose else ""
        offset = 2 * layout.columns * (block * layout.rows + row)
        more = [] if isinstance(self.offset, int) else [self.offset]
        # The exclusive or stays in the loop: hoisted, the addresses took 20 registers.
        return cute.arch.inline_ptx(
            f"{{ .reg .b32 a; xor.b32 a, {{$r0}}, {16 * chunk};"
            f"{' add.s32 a, a, {$r1};' if more else ''}"
            f" ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16"
            f" {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [a + {offset}]; }}",
            write_only_types=4 * [Int32],
            read_only_args=[self.base, *more],
        )


@dataclass(frozen=True)
class SharedResult:
    """Where a warp writes accumulators' elements, two columns at a time; as SharedOperand."""

    layout: TileLayout
    base: Int32  # Lanes.of_result
    offset: Int32

    @staticmethod
    def beside(
        layout: TileLayout, pointer: cute.Pointer, lanes: Int32, first_row=0
    ) -> "SharedResult":
        """first_row: a multiple of 8."""
        return SharedResult(layout, lanes, place(layout, pointer, first_row))

    def store(self, row: int, column: int, word: Int32):
        """Two elements of each lane, of the 8 x 8 from (row, column) on."""
        layout = self.layout
        block, chunk = column // layout.columns, column % layout.columns // CHUNK
        offset = 2 * layout.columns * (block * layout.rows + row)
        cute.arch.inline_ptx(
            f"{{ .reg .b32 a; xor.b32 a, {{$r0}}, {16 * chunk}; add.s32 a, a, {{$r1}};"
            f" st.shared.b32 [a + {offset}], {{$r2}}; }}",
            read_only_args=[self.base, self.offset, word],
        )


def place(layout: TileLayout, pointer: cute.Pointer, first_row) -> Int32:
    """Address of a row of a tile's first column block."""
    return Int32(pointer.toint()) + 2 * layout.columns * first_row


def columns_of(layout: TileLayout, parts: int) -> tuple[int, ...]:
    """First columns of the 16 x 16 elements of the first of `parts` equal parts of a tile.

    The other parts' are as many times first_chunk_of further: within a column block.
    """
    width = layout.columns // parts
    blocks = range(0, layout.width, layout.columns)
    return tuple(block + i for block in blocks for i in range(0, width, 16))


def first_chunk_of(layout: TileLayout, parts: int, part):
    """What a part's first column changes in a lane's bytes, by exclusive or."""
    return part * (2 * layout.columns // parts)


def _fragment(words: list, shape, element: type) -> cute.Tensor:
    """Registers of 16-bit elements."""
    registers = cute.make_rmem_tensor(len(words), Int32)
    for i, word in enumerate(words):
        registers[i] = word
    return cute.make_tensor(
        cute.recast_ptr(registers.iterator, dtype=element), cute.make_layout(shape)
    )


def fragment_a(words: list, element: type) -> cute.Tensor:
    """(MMA, 1) of 16 rows and 16 of K."""
    return _fragment(words, ((2, 2, 2), 1), element)


def fragment_b(words: list, element: type) -> cute.Tensor:
    """(MMA, N/8) of 16 of K."""
    return _fragment(words, ((2, 2), len(words) // 2), element)


def multiply(mma: cute.MmaAtom, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor):
    """acc ((2, 2, N/8), 1, 1) += a (MMA, 1) b (MMA, N/8)^T, 16 of K."""
    fragment = as_fragment(acc)
    cute.gemm(mma, fragment, a, b, fragment)
