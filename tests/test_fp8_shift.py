"""v_shift in the kernel's epilogue: what all values of a channel lack, added to O."""

from dataclasses import dataclass

import pytest
import torch

import fa3

from . import fp8_calls
from .fp8_calls import E4M3, E5M2, H_Q, INT8, B, D, descales, inputs, textbook_attention, values


@dataclass(frozen=True)
class Case:
    dtypes: tuple[torch.dtype, ...]  # of q, k, v
    forms: tuple[str, str, str]  # of the descales
    out: torch.dtype
    causal: bool = False
    s_q: int = 140  # keys: 200

    def __str__(self) -> str:
        names = [str(x).partition(".")[2] for x in (*self.dtypes, self.out)]
        return "-".join([*names, *self.forms, "causal" * self.causal, str(self.s_q)])


CASES = (
    Case((E4M3, E4M3, E4M3), ("none", "none", "none"), torch.bfloat16),
    Case((E4M3, E4M3, E5M2), ("128", "64", "128"), torch.float16, causal=True, s_q=270),
    Case((INT8, INT8, E4M3), ("head", "head", "channels"), torch.float32, causal=True, s_q=270),
)


def _rms(x) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shift(case, device):
    """It adds to O, whole, where there are keys, and changes nothing else."""
    tensors = inputs(*case.dtypes, s_q=case.s_q)
    count = -(-case.s_q // 128)
    given = descales(*case.forms, unit=1 / 32 if case.dtypes[0] == INT8 else 1.0)
    if case.forms[0] == "128":
        given["q_descale"] = torch.rand(B, H_Q, count) + 0.5
    shift = 4 * torch.randn(fp8_calls.SHIFT_SHAPE)

    def call(**more):
        on_device = {name: x.to(device) for name, x in (given | more).items()}
        out = torch.empty(B, case.s_q, H_Q, fp8_calls.DV, dtype=case.out, device=device)
        result = fa3.flash_attn_func(
            *(x.to(device) for x in tensors),
            causal=case.causal,
            out=out,
            return_attn_probs=True,
            **on_device,
        )
        return tuple(x.cpu() for x in result)

    plain, plain_lse = call()
    out, lse = call(v_shift=shift)
    assert torch.equal(lse, plain_lse)
    added = shift.repeat_interleave(2, dim=1)[:, None].expand_as(out)
    is_empty = lse.isneginf().transpose(1, 2)
    assert is_empty.sum() == B * H_Q * max(0, case.s_q - 200) * case.causal
    assert torch.equal(out[is_empty], torch.zeros_like(out[is_empty]))
    wanted = (plain.float() + added).to(case.out)
    seen = ~is_empty
    epsilon = 2 * torch.finfo(case.out).eps
    torch.testing.assert_close(out[seen], wanted[seen], rtol=epsilon, atol=8 * epsilon)

    arrays = [
        values(x, given.get(f"{name}_descale"), form)
        for x, name, form in zip(tensors, "qkv", case.forms, strict=True)
    ]
    arrays[2] = fp8_calls.shifted(arrays[2], shift)
    exact, _ = textbook_attention(*arrays, D**-0.5, case.causal)
    assert _rms(out - exact) <= 0.03 * _rms(exact)
