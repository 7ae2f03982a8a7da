"""One-byte inputs of sequences with lengths of their own."""

import math

import pytest
import torch

import fa3

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
    case = RaggedCase((70, 0, 130, 3), (200, 40, 0, 65), *rows, h_q=4, head_dim=head_dim)
    queries, keys = case.queries, case.keys
    sides = (queries, keys, keys)
    bytes_, scales = [], {}
    for name, side, form, heads in zip("qkv", sides, forms, (4, 2, 2), strict=True):
        values = torch.randn(*side.shape, heads, head_dim, device=device).to(E4M3)
        bytes_.append(side.bordered(values, "bshd"))
        scales[f"{name}_descale"] = _descales(
            side, form, 2 if form == "head" else heads, head_dim, device
        )
    shift = torch.randn(4, 2, head_dim, device=device)
    out, lse = fa3.flash_attn_varlen_func(
        *(side.given(x.tensor) for side, x in zip(sides, bytes_, strict=True)),
        **queries.arguments("q", device),
        **keys.arguments("k", device),
        causal=causal,
        **scales,
        v_shift=shift,
        return_attn_probs=True,
    )
    out, lse = (out, lse) if queries.kind == "dense" else (out[None], lse[None])
    each = [side.each(x.values) for side, x in zip(sides, bytes_, strict=True)]
    of_scales = [
        _each(side, x, form) for side, x, form in zip(sides, scales.values(), forms, strict=True)
    ]
    results = queries.each(out), queries.each(lse, row_dim=2), shift.split(1)
    for *inputs, q_scale, k_scale, v_scale, given, given_lse, own_shift in zip(
        *each, *of_scales, *results, strict=True
    ):
        alone, alone_lse = fa3.flash_attn_func(
            *inputs,
            causal=causal,
            q_descale=q_scale,
            k_descale=k_scale,
            v_descale=v_scale,
            v_shift=own_shift,
            return_attn_probs=True,
        )
        assert torch.equal(given, alone)
        assert torch.equal(given_lse, alone_lse)
