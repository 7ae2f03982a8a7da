"""What a warp multiplies: S = Q K^T and O += P V for its query rows, 16 by 16."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute

from ...views import convert
from ..mma import SharedOperand, accumulator, multiply, operand, tiled_mma
from .load import Loads


@dataclass(frozen=True)
class RowGroup:
    """16 query rows of a warp; a thread has two of them."""

    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1) fp32 registers
    acc_O: cute.Tensor  # ((2, 2, dv / 8), 1, 1) fp32 registers
    p: cute.Tensor  # ((2, 2, 2), 1, tile_n / 16) 16-bit registers

    @staticmethod
    def of(plan) -> "RowGroup":
        acc_S, acc_O = accumulator(plan.tile_n), accumulator(plan.head_dim_v)
        return RowGroup(acc_S, acc_O, operand(plan.tile_n, plan.element))


@dataclass(frozen=True)
class Products:
    """Both products.  A fragment of K or V is read once for all row groups."""

    plan: Any
    mma: cute.TiledMma
    q: SharedOperand
    k: SharedOperand
    v: SharedOperand
    groups: tuple[RowGroup, ...]

    @staticmethod
    def of(plan, thread, sQ: cute.Tensor, sK: cute.Tensor, sV: cute.Tensor) -> "Products":
        """sQ: (tile_m, d, 1), sK: (tile_n, d, stages), sV: (tile_n, dv, stages)"""
        mma = tiled_mma(plan.element, plan.config.num_warps)
        transposed = cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0, 2]))
        return Products(
            plan,
            mma,
            SharedOperand.a(mma, thread, sQ),
            SharedOperand.b(mma, thread, sK, transpose=False),
            SharedOperand.b(mma, thread, transposed, transpose=True),
            tuple(RowGroup.of(plan) for _ in range(plan.row_groups)),
        )

    def start(self, loads: Loads):
        """Before the first block of a tile."""
        for group in self.groups:
            group.acc_O.fill(0.0)
        if self.plan.config.q_in_registers:
            loads.wait()
            for k in range(self.plan.head_dim // 16):
                self.q.load(k, 0)

    def scores(self, stage):
        """S = Q K^T"""
        for group in self.groups:
            group.acc_S.fill(0.0)
        for k in range(self.plan.head_dim // 16):
            self.k.load(k, stage)
            if not self.plan.config.q_in_registers:
                self.q.load(k, 0)
            for m, group in enumerate(self.groups):
                multiply(self.mma, group.acc_S, self.q.rows(k, m), self.k[k])

    def output(self, stage):
        """O += P V"""
        for k in range(self.plan.tile_n // 16):
            self.v.load(k, stage)
            for group in self.groups:
                multiply(self.mma, group.acc_O, group.p[None, None, k], self.v[k])

    def convert(self):
        """P -> operand"""
        for group in self.groups:
            convert(group.acc_S, group.p)
