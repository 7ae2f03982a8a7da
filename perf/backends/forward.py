"""The forward pass of 16-bit tensors."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import Case
from . import vllm
from .common import Absent, Call, Prepare, first, module


def fa3(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """This project."""
    attention = module("fa3").flash_attn_func
    return lambda: attention(q, k, v, causal=case.causal, window_size=case.window)


def fa4(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """flash-attn-4, CuTe DSL."""
    attention = module("flash_attn.cute.interface").flash_attn_func
    window = tuple(None if bound < 0 else bound for bound in case.window)
    return lambda: first(attention(q, k, v, causal=case.causal, window_size=window))


def fa3_cpp(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The C++ FlashAttention-3: its own package, or else vLLM's build of it."""
    try:
        attention = module("flash_attn_interface").flash_attn_func
    except Absent:
        return vllm.call(case, q, k, v)
    return lambda: first(attention(q, k, v, causal=case.causal, window_size=case.window))


def sdpa(backend: SDPBackend) -> Prepare:
    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
        if case.window != (-1, -1):
            raise Absent("scaled_dot_product_attention has no window")
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*heads_first, is_causal=case.causal)
            return out.transpose(1, 2)

        return call

    return prepare
