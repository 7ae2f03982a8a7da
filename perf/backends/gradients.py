"""Gradients of 16-bit tensors, by autograd: alone, and with the forward pass ahead of them."""

import contextlib

import torch
from torch import Tensor

from ..cases import BACKWARD, Case
from .common import Call, Prepare


def upstream(q: Tensor) -> Tensor:
    """The gradient of the output, which is shaped like q: the same for everybody."""
    generator = torch.Generator(q.device).manual_seed(1)
    return torch.randn(q.shape, generator=generator, device=q.device).to(q.dtype)


def of(prepare: Prepare, context=contextlib.nullcontext) -> Prepare:
    """Of a backend's forward pass; context: what its gradients are made in."""

    def prepare_gradients(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        attend, dout = prepare(case, *inputs), upstream(q)

        def gradients(out: Tensor, keep: bool) -> tuple[Tensor, ...]:
            with context():
                return torch.autograd.grad(out, inputs, dout, retain_graph=keep)

        if case.of_pass == BACKWARD:
            out = attend()
            return lambda: gradients(out, True)
        return lambda: gradients(attend(), False)

    return prepare_gradients
