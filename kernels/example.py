"""Symbolic arguments of the forward kernels for cute.compile: any lengths, any 16-byte strides."""

from collections.abc import Callable
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .arguments import FwdArguments


def forward_example(plan: Any, element: Any, scales: Callable) -> tuple:
    """FwdArguments and the stream.

    element: the dtypes q, k, v and out; scales(batch, heads_k, dv): the four fields for scales.
    """
    heads_q, heads_k, s_q, s_k, batch = (cute.sym_int32() for _ in range(5))
    batch_k = cute.sym_int32() if plan.signature.is_ragged else batch
    is_split = plan.signature.is_split
    heads_out = cute.sym_int32() if is_split else heads_q
    unit = max(_in_16_bytes(element.q), _in_16_bytes(element.k))
    d, dv = (cute.sym_int32(divisibility=unit) for _ in range(2))

    def tensor(dtype, batch, length, heads, width):
        strides = (cute.sym_int64(divisibility=_in_16_bytes(dtype)) for _ in range(3))
        shape = (batch, length, heads, width)
        return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=16)

    lse_strides = (cute.sym_int64(), cute.sym_int64(), 1)
    arguments = FwdArguments(
        tensor(element.q, batch, s_q, heads_q, d),
        tensor(element.k, batch_k, s_k, heads_k, d),
        tensor(element.v, batch_k, s_k, heads_k, dv),
        tensor(element.out, batch, s_q, heads_out, dv),
        make_fake_tensor(Float32, (batch, heads_out, s_q), lse_strides, assumed_align=4),
        *scales(batch, heads_k, dv),
        _sinks(heads_q) if plan.signature.sinks else None,
        *plan.lengths.example(),
        scale_log2=Float32(1.0),
        softcap_log2=Float32(0.0),
        window_left=Int32(0),
        window_right=Int32(0),
        num_ctas=Int32(1),
        num_splits=Int32(1) if is_split else None,
        rows_per_query=Int32(1) if plan.signature.packs_heads else None,
        is_listed=Int32(0) if plan.signature.is_ragged else None,
        cache_leftpad=_leftpad() if plan.signature.page_rows else None,
    )
    return arguments, make_fake_stream(use_tvm_ffi_env_stream=True)


def no_scales(batch, heads_k, dv) -> tuple:
    """Those of 16-bit inputs."""
    return None, None, None, None


def head_scales(is_ragged: bool, batch, heads_k, dv) -> tuple:
    """Those of one-byte k and v beside 16-bit q; packed tensors tell no batch."""

    def scales():
        strides = (cute.sym_int64(), cute.sym_int64())
        shape = (cute.sym_int32() if is_ragged else batch, heads_k)
        return make_fake_tensor(Float32, shape, strides, assumed_align=4)

    return None, scales(), scales(), None


def _leftpad():
    return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=4)


def _sinks(heads_q):
    shape, strides = (cute.sym_int32(), heads_q), (cute.sym_int64(), cute.sym_int64())
    return make_fake_tensor(Float32, shape, strides, assumed_align=4)


def _in_16_bytes(dtype) -> int:
    """Elements that TMA takes at once: head dims and strides are multiples of them."""
    return 128 // dtype.width
