"""The forward pass of e4m3 tensors, each with one scale, which is 1.

All of them are given the same numbers. Where a backend wants others of its own kind (block scales,
bf16), they are made of these before the clock starts.
"""

import torch
from torch import Tensor

from ..cases import Case
from . import forward, vllm
from .common import Absent, Call, Scaled, first, module

P_SCALE = 256.0  # P, at most 1, before its cast to e4m3, whose largest number is 448
O_SCALE = 64.0  # out, at most the largest of v, before its cast: normal numbers at all lengths


def fa3(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """This project, with scales per block of rows, as `quantize_fp8` makes them."""
    project = module("fa3")
    x = project.quantize_fp8(*(y.bfloat16() for y in (q, k, v)), block_scales=True)
    options = {"causal": case.causal, "window_size": case.window}
    return lambda: project.flash_attn_func(x.q, x.k, x.v, **x.scales, **options)


def fa3_unscaled(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """This project, without scales."""
    return forward.fa3(case, q, k, v)


def fa3_bf16(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """This project on the same numbers in bf16."""
    return forward.fa3(case, q.bfloat16(), k.bfloat16(), v.bfloat16())


def fa3_cpp(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The C++ FlashAttention-3: its own package, or else vLLM's build of it."""
    one = torch.ones(case.batch, case.heads, device=q.device)
    try:
        attention = module("flash_attn_interface").flash_attn_func
    except Absent:
        return vllm.call(case, q, k, v, one)
    options = {"causal": case.causal, "window_size": case.window}
    descales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), one)
    return lambda: first(attention(q, k, v, **descales, **options))


def cudnn(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """cuDNN by its frontend's graph; on Hopper its FP8 attention can only return e4m3."""
    frontend = module("cudnn")
    if case.window != (-1, -1):
        raise Absent("this backend is not asked for windows")
    graph = frontend.pygraph(
        io_data_type=frontend.data_type.FP8_E4M3,
        intermediate_data_type=frontend.data_type.FLOAT,
        compute_data_type=frontend.data_type.FLOAT,
    )
    buffers: dict = {}  # what is bound to each tensor of the graph
    fp32 = {"dim": [1] * 4, "stride": [1] * 4, "data_type": frontend.data_type.FLOAT}

    def heads_first(x: Tensor) -> dict:
        view = x.transpose(1, 2)
        return {"dim": list(view.shape), "stride": list(view.stride())}

    def of_input(x: Tensor):
        node = graph.tensor(**heads_first(x), data_type=frontend.data_type.FP8_E4M3)
        buffers[node] = x
        return node

    def scale(value: float):
        node = graph.tensor(**fp32)
        buffers[node] = torch.full((1, 1, 1, 1), value, device=q.device)
        return node

    names = ("descale_q", "descale_k", "descale_v")
    o, _, amax_s, amax_o = graph.sdpa_fp8(
        **dict(zip("qkv", map(of_input, (q, k, v)), strict=True)),
        **{name: scale(1.0) for name in names},
        scale_s=scale(P_SCALE),
        descale_s=scale(1 / P_SCALE),
        scale_o=scale(O_SCALE),
        generate_stats=False,
        attn_scale=case.head_dim**-0.5,
        use_causal_mask=case.causal,
        use_padding_mask=False,
    )
    out = torch.empty_like(q)
    shape = heads_first(out)
    o.set_output(True).set_dim(shape["dim"]).set_stride(shape["stride"])
    o.set_data_type(frontend.data_type.FP8_E4M3)
    buffers[o] = out
    for node in (amax_s, amax_o):
        node.set_output(True).set_dim([1] * 4).set_stride([1] * 4)
        node.set_data_type(frontend.data_type.FLOAT)
        buffers[node] = torch.zeros(1, 1, 1, 1, device=q.device)
    graph.build([frontend.heur_mode.A, frontend.heur_mode.FALLBACK])
    workspace = torch.empty(max(graph.get_workspace_size(), 1), device=q.device, dtype=torch.uint8)

    def call() -> Scaled:
        graph.execute(buffers, workspace)
        return Scaled(out, 1 / O_SCALE)

    return call
