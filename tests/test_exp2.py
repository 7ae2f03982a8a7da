"""2^y without the MUFU: its error, and that it costs FP8 attention nothing."""

import dataclasses
import math

import torch

from fa3.launch import dispatch, jit

from .fp8_model import Numerics, attention


@dataclasses.dataclass(frozen=True)
class Nothing:
    """The signature and config of the kernel that is compiled."""


def computed(device, y: torch.Tensor) -> torch.Tensor:
    target = dispatch.target_of(device).kind
    run = jit.compile("tests.exp2_kernel:Exp2", Nothing(), Nothing(), target)
    out = torch.empty_like(y, device=device)
    run(y.to(device), out)
    return out.cpu()


def test_error(device):
    """Below 2^-9, a thirtieth of what e4m3 rounds; the exponentials of a softmax are below 2^9."""
    y = torch.cat([torch.linspace(-126, 9, 6000), torch.arange(-126.0, 10.0)])
    exact = torch.exp2(y.double())
    error = (computed(device, y).double() / exact - 1).abs().max().item()
    assert 1.6e-3 < error < 2.0**-9, f"relative error {error:.3e}"


def test_ends(device):
    """What is masked is exactly 0, and NaN is not lost."""
    y = torch.tensor([-math.inf, -1e30, -127.0, -126.6, math.nan, 0.0, 8.0])
    result = computed(device, y)
    assert result[:4].tolist() == [0.0] * 4
    assert result[4].isnan()
    assert result[5:].to(torch.float8_e4m3fn).tolist() == [1.0, 256.0]


def test_attention_does_not_notice(device):
    """The rounding of P to e4m3 is fifteen times coarser."""
    q, k, v = (torch.randn(1, s, 1, 64).to(torch.float8_e4m3fn) for s in (64, 256, 256))
    ones = [torch.ones(1, 1)] * 3
    S = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1)) / 8
    exact = (S.softmax(-1) @ v.double().transpose(1, 2)).transpose(1, 2)

    def error(exp2) -> float:
        out, _ = attention((q, k, v, *ones), numerics=Numerics(exp2=exp2))
        return (out.double() - exact).square().mean().sqrt().item()

    fast = error(lambda y: computed(device, y.flatten()).view_as(y))
    assert fast < 1.01 * error(torch.exp2)
