"""What a warp of a side multiplies: three of the five products, 16 by 16.

    side    made first         then                          its sums
    P       S^T = K Q^T        P^T = exp2(S^T scale - lse)    dV += P^T dO
    dS      dP^T = V dO^T      dS^T = P^T (dP^T - delta)      dK += dS^T Q

and of both a part of dQ = dS K.  With softcap the second side gets P times its slope, where dS goes
then.  Scores are made transposed, keys by queries: where a warp has keys
of its own, P^T and dS^T are the operands of its sums as they are in its registers.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...scores import KeyScores
from ...views import convert, rows_and_columns
from ..bwd_config import SIDE_WARPS
from ..mma import (
    ROWS,
    Lanes,
    SharedOperand,
    SharedResult,
    accumulator,
    columns_of,
    first_chunk_of,
    fragment_a,
    fragment_b,
    multiply,
    operand,
    warp_mma,
)


@dataclass(frozen=True)
class KeyGroup:
    """16 keys of a warp; a thread has two of them."""

    scores: cute.Tensor  # ((2, 2, slice_columns / 8), 1, 1) fp32 registers: S^T or dP^T
    values: cute.Tensor  # ((2, 2, 2), 1, score_columns / 16) 16-bit registers: P^T or dS^T
    sums: cute.Tensor  # ((2, 2, channels / 8), 1, 1) fp32 registers: dV or dK
    keys: cute.Tensor | None  # ((2, 2, 2), 1, n / 16) 16-bit registers: the first columns of K or V

    @staticmethod
    def of(plan, channels: int, in_registers: int) -> "KeyGroup":
        """in_registers: columns of K or V."""
        config, element = plan.config, plan.element
        return KeyGroup(
            accumulator(config.slice_columns),
            operand(config.score_columns, element),
            accumulator(channels),
            operand(in_registers, element) if in_registers else None,
        )


@dataclass(frozen=True)
class Side:
    """A warp's products; makes_p: of the side that makes P, else of the one that makes dS."""

    plan: cutlass.Constexpr[Any]
    mma: cute.MmaAtom
    makes_p: cutlass.Constexpr[bool]
    keys: SharedOperand  # rows of K or V of the warp
    rows: SharedOperand  # Q or dO, of which scores are made
    others: SharedOperand  # the other one, for the sums
    values: SharedOperand  # P^T or dS^T of the warp's keys: where their queries are of others, too
    own_p: SharedOperand  # P^T of this warp's place, times the slope of what scores go through
    result: SharedResult  # P^T or dS^T of this warp's place
    with_slope: SharedResult | None  # own_p, where that is not P^T
    ds: SharedOperand  # of a part of dQ
    k: SharedOperand  # of a part of dQ
    groups: tuple[KeyGroup, ...]

    @staticmethod
    def of(plan, makes_p: bool, warp, lane, space) -> "Side":
        """warp: of the side."""
        config = plan.config
        at_keys, part = config.split(warp)
        first_key = at_keys * config.keys_per_warp
        keys, rows, others = (plan.k, plan.q, plan.do) if makes_p else (plan.v, plan.do, plan.q)
        space_of_keys, space_of_rows, space_of_others = (
            (space.k, space.q, space.do) if makes_p else (space.v, space.do, space.q)
        )
        p_or_ds = space.p if makes_p else space.ds
        has_slope = plan.signature.score is not None
        row_warps, column_warps = config.dq_warps(plan.signature.head_dim)
        of_all = warp if makes_p else warp + SIDE_WARPS
        dq_row = of_all % row_warps * (config.tile_m // row_warps)

        at_others = first_chunk_of(others, config.column_warps, part)
        at_scores = first_chunk_of(plan.p, config.column_warps, part)
        at_dq = first_chunk_of(plan.k, column_warps, of_all // row_warps)
        widths = {layout.columns for layout in (plan.p, plan.k, plan.v)}
        same = {columns: Lanes.of(columns, lane) for columns in sorted(widths)}
        in_registers = config.k_in_registers if makes_p else config.v_in_registers
        make = SharedOperand.beside
        lanes = same[plan.p.columns]
        return Side(
            plan,
            warp_mma(plan.element),
            makes_p,
            make(keys, space_of_keys, same[keys.columns].a, first_key),
            make(rows, space_of_rows, same[rows.columns].b, part * config.score_columns),
            make(others, space_of_others, same[others.columns].a ^ at_others),
            make(plan.p, p_or_ds, lanes.a, first_key),
            make(plan.p, space.ds if has_slope else space.p, lanes.a ^ at_scores, first_key),
            SharedResult.beside(plan.p, p_or_ds, lanes.result ^ at_scores, first_key),
            SharedResult.beside(plan.p, space.ds, lanes.result ^ at_scores, first_key)
            if has_slope
            else None,
            make(plan.p, space.ds, lanes.b ^ 2 * dq_row),
            make(plan.k, space.k, same[plan.k.columns].a ^ at_dq),
            tuple(
                KeyGroup.of(plan, others.width // config.column_warps, in_registers)
                for _ in range(plan.key_groups)
            ),
        )

    @property
    def columns(self) -> tuple[int, ...]:
        """Of the sums: see columns_of."""
        return columns_of(self.others.layout, self.plan.config.column_warps)

    @property
    def dq_columns(self) -> tuple[int, ...]:
        return columns_of(self.plan.k, self.plan.config.dq_warps(self.plan.signature.head_dim)[1])

    @property
    def in_registers(self) -> int:
        """Columns of K or V."""
        config = self.plan.config
        return config.k_in_registers if self.makes_p else config.v_in_registers

    def keep(self):
        """The first columns of K or V, which are in shared memory -> registers."""
        for m, group in enumerate(self.groups):
            for k in range(0, self.in_registers, 16):
                words = cute.recast_tensor(group.keys, Int32)
                for i, word in enumerate(self.keys.load(ROWS * m, k)):
                    words[k // 4 + i] = word

    def start(self):
        """Before the first query block of a tile."""
        for group in self.groups:
            group.sums.fill(0.0)

    def score(self, stage, part: int):
        """A slice of S^T = K Q^T, or of dP^T = V dO^T"""
        element, rows = self.plan.element, self.rows.at(stage)
        count = self.plan.config.slice_columns
        for group in self.groups:
            group.scores.fill(0.0)
        for k in range(0, self.rows.layout.width, 16):
            a = [self._own(m, k) for m in range(len(self.groups))]
            for n in range(0, count, 16):
                b = fragment_b(rows.load(part * count + n, k), element)
                for group, own in zip(self.groups, a, strict=True):
                    multiply(self.mma, _columns(group.scores, n, 16), own, b)

    def _own(self, m: int, k: int) -> cute.Tensor:
        """16 of the warp's rows of K or V, from column k on."""
        if k < self.in_registers:
            return self.groups[m].keys[None, None, k // 16]
        return fragment_a(self.keys.load(ROWS * m, k), self.plan.element)

    def exponentiate(self, part: int, scores: KeyScores, lse: cute.Tensor):
        """A slice of S -> P, in 16 bits and in shared memory; lse (slice_columns / 4,)."""
        config = self.plan.config
        for m, group in enumerate(self.groups):
            p = scores.exponentiate(group.scores, lse)
            for j in range(config.slice_columns // 16):
                words = self._converted(m, part, j, p)
                if self.with_slope is None or config.column_warps > 1:
                    self._write(self.result, m, part, j, words)
                if self.with_slope is not None:
                    self._write(self.with_slope, m, part, j, self._words(_eighth(group.scores, j)))

    def differentiate(self, part: int, delta: cute.Tensor):
        """A slice of dP -> dS, in 16 bits and in shared memory; delta (slice_columns / 4,)."""
        config = self.plan.config
        count = config.slice_columns
        for m, group in enumerate(self.groups):
            dp = rows_and_columns(group.scores)
            for j in range(count // 16):
                words = self.own_p.load(ROWS * m, part * count + 16 * j)
                p = fragment_a(words, self.plan.element)
                for c in range(2):  # a fragment is ((column, row, eight columns), 1)
                    for r in range(2):
                        for e in range(2):
                            i = 4 * j + 2 * e + c
                            value = Float32(p[((c, r, e), 0)])
                            dp[r, i] = value * (dp[r, i] - delta[i])
                words = self._converted(m, part, j, group.scores)
                if self.plan.signature.with_dq or config.column_warps > 1:
                    self._write(self.result, m, part, j, words)

    def _converted(self, m: int, part: int, j: int, acc: cute.Tensor) -> cute.Tensor:
        """The j-th 16 columns of a slice, which are P or dS by now, to 16 bits: (4,) words."""
        values = _eighth(self.groups[m].values, self._column(part, j) // 16)
        convert(_eighth(acc, j), values)
        return cute.recast_tensor(values, Int32)

    def _words(self, numbers: cute.Tensor) -> cute.Tensor:
        """(8,) fp32 -> (4,) words of 16-bit elements."""
        values = cute.make_rmem_tensor_like(numbers, self.plan.element)
        convert(numbers, values)
        return cute.recast_tensor(values, Int32)

    def _write(self, target: SharedResult, m: int, part: int, j: int, words: cute.Tensor):
        for e in range(2):
            for r in range(2):
                column = self._column(part, j) + 8 * e
                target.store(ROWS * m + 8 * r, column, words[2 * e + r])

    def _column(self, part: int, j: int) -> int:
        return part * self.plan.config.slice_columns + 16 * j

    def add(self, stage):
        """dV += P^T dO, or dK += dS^T Q"""
        others = self.others.at(stage)
        for k in range(0, self.plan.config.tile_m, 16):
            a = [self._value(m, k) for m in range(len(self.groups))]
            for j, n in enumerate(self.columns):
                b = fragment_b(others.load(k, n, transpose=True), self.plan.element)
                for group, value in zip(self.groups, a, strict=True):
                    multiply(self.mma, _columns(group.sums, 16 * j, 16), value, b)

    def _value(self, m: int, k: int) -> cute.Tensor:
        """P^T or dS^T of 16 of the warp's keys, from query k on."""
        if self.plan.config.column_warps == 1:
            return self.groups[m].values[None, None, k // 16]
        return fragment_a(self.values.load(ROWS * m, k), self.plan.element)

    def dq(self) -> tuple[cute.Tensor, ...]:
        """This warp's part of dQ = dS K: ((2, 2, columns / 8), 1, 1) per 16 queries."""
        plan, element = self.plan, self.plan.element
        row_warps, _ = plan.config.dq_warps(plan.signature.head_dim)
        rows = range(0, plan.config.tile_m // row_warps, ROWS)
        accs = tuple(accumulator(16 * len(self.dq_columns)) for _ in rows)
        for acc in accs:
            acc.fill(0.0)
        for k in range(0, plan.config.tile_n, 16):
            a = [fragment_a(self.ds.load(k, row, transpose=True), element) for row in rows]
            for j, n in enumerate(self.dq_columns):
                b = fragment_b(self.k.load(k, n, transpose=True), element)
                for acc, ds in zip(accs, a, strict=True):
                    multiply(self.mma, _columns(acc, 16 * j, 16), ds, b)
        return accs


def _columns(acc: cute.Tensor, first: int, count: int) -> cute.Tensor:
    """((2, 2, count / 8), 1, 1): some columns of an accumulator."""
    layout = cute.make_layout(((2, 2, count // 8), 1, 1), stride=((1, 2, 4), 0, 0))
    return cute.make_tensor(acc.iterator + first // 8 * 4, layout)


def _eighth(registers: cute.Tensor, j: int) -> cute.Tensor:
    """(8,): the elements of the j-th 16 columns, in their order."""
    return cute.make_tensor(registers.iterator + 8 * j, cute.make_layout(8))
