"""What a warp multiplies: S = Q K^T and O += P V for its query rows, 16 by 16."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int32

from ...views import convert
from ..mma import (
    SharedOperand,
    accumulator,
    fragment_a,
    fragment_b,
    multiply,
    operand,
    warp_mma,
)


@dataclass(frozen=True)
class RowGroup:
    """16 query rows of a warp; a thread has two of them."""

    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1) fp32 registers
    acc_O: cute.Tensor  # ((2, 2, dv / 8), 1, 1) fp32 registers
    p: cute.Tensor  # ((2, 2, 2), 1, tile_n / 16) 16-bit registers
    q: cute.Tensor | None  # ((2, 2, 2), 1, n / 16) 16-bit registers: the first columns of Q

    @staticmethod
    def of(plan) -> "RowGroup":
        acc_S, acc_O = accumulator(plan.tile_n), accumulator(plan.head_dim_v)
        q = operand(plan.q_in_registers, plan.element) if plan.q_in_registers else None
        return RowGroup(acc_S, acc_O, operand(plan.tile_n, plan.element), q)


@dataclass(frozen=True)
class Products:
    """Both products.  A fragment of K or V is read once for all row groups."""

    plan: Any
    mma: cute.MmaAtom
    q: SharedOperand  # of the warp's rows
    k: SharedOperand
    v: SharedOperand
    groups: tuple[RowGroup, ...]

    @staticmethod
    def of(plan, lane, warp, space) -> "Products":
        return Products(
            plan,
            warp_mma(plan.element),
            SharedOperand.of(plan.q, space.q, lane, plan.first_rows(warp)[0]),
            SharedOperand.of(plan.k, space.k, lane, is_k=True),
            SharedOperand.of(plan.v, space.v, lane),
            tuple(RowGroup.of(plan) for _ in range(plan.row_groups)),
        )

    def start(self):
        """Before the first block of a tile."""
        for group in self.groups:
            group.acc_O.fill(0.0)

    def keep(self):
        """The first columns of Q, which is in shared memory -> registers."""
        for group, row in zip(self.groups, self.plan.first_rows(0), strict=True):
            for k in range(0, self.plan.q_in_registers, 16):
                words = cute.recast_tensor(group.q, Int32)
                for i, word in enumerate(self.q.load(row, k)):
                    words[k // 4 + i] = word

    def scores(self, stage):
        """S = Q K^T"""
        element, keys = self.plan.element, self.k.at(stage)
        for group in self.groups:
            group.acc_S.fill(0.0)
        for k in range(0, self.plan.head_dim, 16):
            words = [w for n in range(0, self.plan.tile_n, 16) for w in keys.load(n, k)]
            b = fragment_b(words, element)
            for group, row in zip(self.groups, self.plan.first_rows(0), strict=True):
                multiply(self.mma, group.acc_S, self._q(group, row, k), b)

    def _q(self, group: RowGroup, row: int, k: int) -> cute.Tensor:
        """16 rows, from column k on."""
        if k < self.plan.q_in_registers:
            return group.q[None, None, k // 16]
        return fragment_a(self.q.load(row, k), self.plan.element)

    def output(self, stage):
        """O += P V"""
        values, width = self.v.at(stage), self.plan.head_dim_v
        for k in range(0, self.plan.tile_n, 16):
            words = [w for n in range(0, width, 16) for w in values.load(k, n, transpose=True)]
            b = fragment_b(words, self.plan.element)
            for group in self.groups:
                multiply(self.mma, group.acc_O, group.p[None, None, k // 16], b)

    def convert(self):
        """P -> operand"""
        for group in self.groups:
            convert(group.acc_S, group.p)
