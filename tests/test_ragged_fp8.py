"""One-byte inputs of sequences with lengths of their own."""

import math

import pytest
import torch

import fa3
from fa3 import emulator
from fa3.launch import dispatch

from .conftest import HOPPER
from .ragged_cases import RaggedCase, Rows

E4M3 = torch.float8_e4m3fn


def _descales(rows: Rows, form: str, heads: int, width: int, device) -> torch.Tensor:
    """With NaN wherever no block of a sequence is."""
    if form == "head":
        return torch.rand(len(rows.lengths), heads, device=device) + 0.5
    if form == "channels":
        return torch.rand(len(rows.lengths), heads, 1, width, device=device) + 0.5
    block = int(form)
    if rows.kind == "dense":
        shape = len(rows.lengths), heads, -(-rows.shape[1] // block)
    else:
        shape = 1, heads, rows.shape[1] // block + len(rows.lengths)
    scales = torch.full(shape, math.nan, device=device)
    for part in rows.blocks(scales, block):
        part.copy_(torch.rand(part.shape) + 0.5)
    return scales


def _each(rows: Rows, scales: torch.Tensor, form: str):
    """What a dense call of each sequence is given."""
    if form in ("head", "channels"):
        return scales.split(1)
    return rows.blocks(scales, int(form))


class Call:
    """A call with sequences of such lengths, and what computes each of them alone.

    forms: of the scales of q, k and v.
    """

    def __init__(self, case: RaggedCase, forms: tuple[str, str, str], device):
        self.case, self.forms, self.device = case, forms, device
        self.sides = case.queries, case.keys, case.keys
        self.bytes, self.scales = [], []
        heads_and_forms = zip((case.h_q, case.h_k, case.h_k), forms, strict=True)
        for side, (heads, form) in zip(self.sides, heads_and_forms, strict=True):
            values = torch.randn(*side.shape, heads, case.head_dim, device=device).to(E4M3)
            self.bytes.append(side.bordered(values, "bshd"))
            heads = case.h_k if form == "head" else heads
            self.scales.append(_descales(side, form, heads, case.head_dim, device))
        self.shift = torch.randn(len(case.lengths_k), case.h_k, case.head_dim, device=device)

    def __call__(self) -> list[torch.Tensor]:
        """out of each sequence, then lse of each."""
        case, num_sms = self.case, dispatch.target_of(self.device).num_sms
        out, lse = fa3.flash_attn_varlen_func(
            *(side.given(x.tensor) for side, x in zip(self.sides, self.bytes, strict=True)),
            **case.arguments(self.device),
            **self._scales(self.scales, self.shift),
            sm_margin=0 if case.num_ctas is None else num_sms - case.num_ctas,
            return_attn_probs=True,
        )
        out, lse = (out, lse) if case.rows_q == "dense" else (out[None], lse[None])
        return [*case.queries.each(out), *case.queries.each(lse, row_dim=2)]

    def alone(self) -> list[torch.Tensor]:
        """The same of dense calls."""
        tensors = (side.each(x.values) for side, x in zip(self.sides, self.bytes, strict=True))
        scales = map(_each, self.sides, self.scales, self.forms)
        found = [
            fa3.flash_attn_func(
                *inputs,
                causal=self.case.causal,
                **self._scales(own, shift),
                return_attn_probs=True,
            )
            for inputs, own, shift in zip(
                zip(*tensors, strict=True),
                zip(*scales, strict=True),
                self.shift.split(1),
                strict=True,
            )
        ]
        return [out for out, _ in found] + [lse for _, lse in found]

    def _scales(self, scales, shift) -> dict:
        names = (f"{name}_descale" for name in "qkv")
        return {**dict(zip(names, scales, strict=True)), "v_shift": shift}


def _assert_equal(given: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(given, wanted, strict=True))


@pytest.mark.parametrize(
    ("forms", "rows", "causal", "head_dim"),
    [
        (("128", "64", "128"), ("packed", "packed"), False, 64),
        (("128", "128", "64"), ("slack", "dense"), True, 128),
        (("head", "head", "channels"), ("dense", "slack"), True, 256),
        (("128", "64", "head"), ("packed", "slack"), True, 192),
    ],
    ids=str,
)
def test_fp8_is_computed_as_if_alone(forms, rows, causal, head_dim, device):
    """Bit by bit, whatever the scales and bytes of others are."""
    lengths = (70, 0, 130, 3), (200, 40, 0, 65)
    case = RaggedCase(*lengths, *rows, head_dim=head_dim, h_q=4, causal=causal)
    call = Call(case, forms, device)
    _assert_equal(call(), call.alone())


@pytest.mark.skipif(HOPPER, reason="a GPU has one schedule, its own")
@pytest.mark.parametrize(
    ("case", "forms"),
    [
        (RaggedCase((200, 0, 70), (150, 40, 0), h_q=1, h_k=1, num_ctas=2), ("128", "64", "128")),
        (
            RaggedCase(
                *((70, 1, 0), (100, 0, 9), "slack", "dense"),
                head_dim=256,
                h_q=1,
                h_k=1,
                causal=True,
                num_ctas=1,
            ),
            ("head", "head", "channels"),
        ),
    ],
    ids=str,
)
def test_fp8_is_the_same_under_every_schedule(case, forms, device):
    call = Call(case, forms, device)
    found = emulator.compare_schedules(call, range(2), checks=emulator.ALL_CHECKS)
    _assert_equal(found, call.alone())
