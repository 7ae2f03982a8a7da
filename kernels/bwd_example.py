"""Symbolic arguments of the backward kernels for cute.compile: any lengths, any 16-byte strides."""

from typing import Any

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .bwd_arguments import LENGTHS, PARTS, BwdArguments


def backward_example(plan: Any) -> tuple:
    """BwdArguments and the stream; plan: signature, config, element and lengths."""
    signature, tile_m, element = plan.signature, plan.config.tile_m, plan.element
    batch, s_q, s_k, heads_q, heads_k, m_blocks = (cute.sym_int32() for _ in range(6))
    batch_k = cute.sym_int32() if signature.is_ragged else batch
    with_dlse = cute.sym_int32()
    d, dv = (cute.sym_int32(divisibility=8) for _ in range(2))

    def tensor(batch, length, heads, width):
        strides = (cute.sym_int64(divisibility=8) for _ in range(3))
        shape = (batch, length, heads, width)
        return make_fake_tensor(element, shape, (*strides, 1), assumed_align=16)

    def numbers(batch):
        strides = cute.sym_int64(), cute.sym_int64(), 1
        return make_fake_tensor(Float32, (batch, heads_q, s_q), strides, assumed_align=4)

    def blocks(width, element=Float32):
        strides = (cute.sym_int64(divisibility=128 // element.width) for _ in range(2))
        shape, strides = (batch, heads_q, m_blocks, width), (*strides, width, 1)
        return make_fake_tensor(element, shape, strides, assumed_align=16)

    def counters(width):
        strides = (cute.sym_int64(), cute.sym_int64(), width, 1)
        return make_fake_tensor(Int32, (batch, heads_q, m_blocks, width), strides, assumed_align=4)

    arguments = BwdArguments(
        q=tensor(batch, s_q, heads_q, d),
        k=tensor(batch_k, s_k, heads_k, d),
        v=tensor(batch_k, s_k, heads_k, dv),
        out=tensor(batch, s_q, heads_q, dv),
        dout=tensor(batch, s_q, heads_q, dv),
        lse=numbers(batch),
        dlse=numbers(with_dlse),
        dq=tensor(batch, s_q, heads_q, d) if signature.with_dq else None,
        dk=tensor(batch_k, s_k, heads_k, d) if signature.with_dkv else None,
        dv=tensor(batch_k, s_k, heads_k, dv) if signature.with_dkv else None,
        row_stats=blocks(2 * tile_m),
        delta_parts=blocks(PARTS * tile_m, BFloat16) if plan.config.delta_in_parts else None,
        dq_sums=blocks(tile_m * signature.head_dim) if signature.with_dq else None,
        dq_counters=counters(plan.config.dq_counters) if signature.deterministic else None,
        **dict(zip(LENGTHS, plan.lengths.example(), strict=True)),
        softmax_scale=Float32(1.0),
        scale_log2=Float32(1.0),
        softcap_log2=Float32(0.0) if signature.score == "softcap" else None,
        window_left=Int32(0),
        window_right=Int32(0),
        num_ctas=Int32(1),
    )
    return arguments, make_fake_stream(use_tvm_ffi_env_stream=True)
