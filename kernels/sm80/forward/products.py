"""What a warp multiplies: S = Q K^T and O += P V for its query rows, 16 by 16."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int32

from ...views import convert
from ..mma import (
    SharedOperand,
    accumulator,
    columns_of,
    fragment_a,
    fragment_b,
    multiply,
    operand,
    warp_mma,
)
from .pair import Pair


@dataclass(frozen=True)
class RowGroup:
    """16 query rows of a warp; a thread has two of them."""

    acc_S: cute.Tensor  # ((2, 2, keys / 8), 1, 1) fp32 registers
    acc_O: cute.Tensor  # ((2, 2, columns / 8), 1, 1) fp32 registers
    p: cute.Tensor  # ((2, 2, 2), 1, keys / 16) 16-bit registers
    q: cute.Tensor | None  # ((2, 2, 2), 1, n / 16) 16-bit registers: the first columns of Q

    @staticmethod
    def of(plan) -> "RowGroup":
        keys, columns = plan.keys_per_warp, plan.columns_per_warp
        q = operand(plan.q_in_registers, plan.element) if plan.q_in_registers else None
        p = operand(keys, plan.element)
        return RowGroup(accumulator(keys), accumulator(columns), p, q)


@dataclass(frozen=True)
class Products:
    """Both products.  A fragment of K or V is read once for all row groups."""

    plan: Any
    mma: cute.MmaAtom
    q: SharedOperand  # of the warp's rows
    k: SharedOperand
    v: tuple[SharedOperand, ...]  # the warp's keys, and those of the other warp of its rows
    groups: tuple[RowGroup, ...]
    pair: Pair | None

    @staticmethod
    def of(plan, lane, warp, space) -> "Products":
        part, keys = plan.part(warp), plan.keys_per_warp
        first_keys = [keys * (part ^ i) for i in range(plan.config.warps_per_row)]
        return Products(
            plan,
            warp_mma(plan.element),
            SharedOperand.of(plan.q, space.q, lane, plan.first_rows(warp)[0]),
            SharedOperand.of(plan.k, space.k, lane, first_keys[0], is_k=True),
            tuple(SharedOperand.of(plan.v, space.v, lane, x, part=part) for x in first_keys),
            tuple(RowGroup.of(plan) for _ in range(plan.row_groups)),
            Pair.of(plan, space.pairs, lane, warp) if plan.has_pairs else None,
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
            words = [w for n in range(0, self.plan.keys_per_warp, 16) for w in keys.load(n, k)]
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
        columns = columns_of(self.plan.v, self.plan.config.warps_per_row)
        parts = tuple(group.p for group in self.groups)
        for i, values in enumerate(self.v):
            if i > 0:
                self.pair.take(parts)
            for k in range(0, self.plan.keys_per_warp, 16):
                words = [w for n in columns for w in values.at(stage).load(k, n, transpose=True)]
                b = fragment_b(words, self.plan.element)
                for group, p in zip(self.groups, parts, strict=True):
                    multiply(self.mma, group.acc_O, p[None, None, k // 16], b)

    def convert(self):
        """P -> operand"""
        for group in self.groups:
            convert(group.acc_S, group.p)
        if self.pair is not None:
            self.pair.give(tuple(group.p for group in self.groups))
