"""Operands that TMA moves between global memory and a stage of shared memory."""

import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync

from ..tensors import TmaOperand


def tma_load(tensor: cute.Tensor, smem: cute.ComposedLayout, tile, num_ctas: int = 1) -> TmaOperand:
    """The operand that TMA brings into a stage of `smem`, tile by tile.

    num_ctas: of a cluster, each of which brings its part of a tile to all (rings.Ring).
    """
    if num_ctas == 1:
        return _tma_operand(cpasync.CopyBulkTensorTileG2SOp(), tensor, smem, tile)
    op = cpasync.CopyBulkTensorTileG2SMulticastOp()
    return _tma_operand(op, tensor, smem, tile, num_multicast=num_ctas)


def tma_load_parts(tensor: cute.Tensor, smem: cute.ComposedLayout, part) -> TmaOperand:
    """The operand that TMA brings into a stage of `smem` part by part."""
    stage = cute.select(smem, mode=[0, 1])
    rows_and_columns = cute.get(cute.zipped_divide(stage.outer, part), mode=[0])
    of_part = cute.make_composed_layout(stage.inner, stage.offset, rows_and_columns)
    op = cpasync.CopyBulkTensorTileG2SOp()
    return TmaOperand(*cpasync.make_tiled_tma_atom(op, tensor, of_part, part))


def tma_store(tensor: cute.Tensor, smem: cute.ComposedLayout, tile) -> TmaOperand:
    return _tma_operand(cpasync.CopyBulkTensorTileS2GOp(), tensor, smem, tile)


def _tma_operand(op, tensor: cute.Tensor, smem: cute.ComposedLayout, tile, **more) -> TmaOperand:
    stage = cute.select(smem, mode=[0, 1])
    return TmaOperand(*cpasync.make_tiled_tma_atom(op, tensor, stage, tile, **more))
