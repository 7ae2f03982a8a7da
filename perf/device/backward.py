"""The backward pass: every row of its tuning table."""

import functools
from itertools import product

import torch
from torch import Tensor

from fa3.kernels.bwd_signature import BwdSignature
from fa3.launch import dispatch, tuning

from .. import check, variants
from ..cases import BACKWARD
from .exact import gradient_error
from .forward import LENGTHS, WINDOWS, Forward
from .small import Small, upstream


class Backward(Forward):
    """A row of passes.PASSES. Deterministic, so that its results can be compared bit by bit."""

    name = BACKWARD
    limits = check.GRADIENT_ERROR
    tests = ("tests/test_backward.py", "tests/test_backward_ragged.py")
    sanitized = (
        Small("bf16", 128, 128, 150, 200, causal=True),
        Small("bf16", 64, 64, 200, 150, window=(40, 30)),
        Small("fp16", 256, 256, 100, 130),
    )
    repeated = (
        Small("bf16", 128, 128, 1024, 1024, True, batch=4, h_q=16, h_k=4),
        Small("bf16", 64, 64, 1999, 2111, batch=2, h_q=16, h_k=16),
        Small("bf16", 256, 256, 1000, 1100, window=(500, 100), batch=2, h_q=8, h_k=8),
    )
    first_calls = (Small("bf16", 128, 128, 128, 128, causal=True),)

    def signatures(self) -> list[BwdSignature]:
        return [variant.signature for variant in variants.backward()]

    def tuned(self) -> list[BwdSignature]:
        """None so far."""
        return []

    def config(self, signature: BwdSignature):
        return tuning.backward(signature, self.target.capability)

    def key(self, signature: BwdSignature, config) -> tuple:
        where = dispatch.backward(signature, self.target).where
        return where, signature, config, self.target.arch

    def inputs(self, case: Small, device="cpu") -> tuple[Tensor, ...]:
        """q, k, v and dout."""
        return *case.inputs(device), upstream(case, device)

    def call(self, case: Small, inputs) -> dict[str, Tensor]:
        import fa3

        *qkv, dout = inputs
        leaves = [x.detach().requires_grad_() for x in qkv]
        options = {"causal": case.causal, "window_size": case.window, "deterministic": True}
        with self.context():
            out = fa3.flash_attn_func(*leaves, **options)
            gradients = torch.autograd.grad(out, leaves, dout)
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    def error(self, case: Small, inputs, outputs: dict[str, Tensor]) -> float:
        return gradient_error(case, inputs, list(outputs.values()), self.lengths(case))

    @functools.cached_property
    def smalls(self) -> list[Small]:
        """Every pair of head dims under every mask."""
        cases = []
        for i, (dims, mask) in enumerate(product(sorted(tuning.BACKWARD), variants.MASKS)):
            dtype, heads, lengths = ("bf16", "fp16")[i % 2], ((2, 1), (2, 2))[i % 2], LENGTHS[i % 5]
            cases.append(Small(dtype, *dims, *lengths, *WINDOWS[mask], 1, *heads, seed=i))
        return cases
