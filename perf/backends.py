"""The attention kernels that the sweep times: name -> prepare(case, q, k, v) -> call.

`prepare` does everything that is not the kernel (views, lengths, scratch) and returns a call
without arguments that gives out (b, s, h, d). It raises Absent, with the reason, where the backend
is not installed or does not do the case.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case

Call = Callable[[], Tensor]
Prepare = Callable[[Case, Tensor, Tensor, Tensor], Call]

VLLM_FA3 = "_vllm_fa3_C.abi3.so"  # looked for on sys.path; FA3_CPP_LIBRARY names another place


class Absent(Exception):
    """The backend cannot run this case here; the text says why."""


def _module(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation is as absent as none
        raise Absent(f"import {name}: {type(error).__name__}: {error}") from error


def _first(result) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def fa3(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """This project."""
    attention = _module("fa3").flash_attn_func
    return lambda: attention(q, k, v, causal=case.causal, window_size=case.window)


def fa4(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """flash-attn-4, CuTe DSL."""
    attention = _module("flash_attn.cute.interface").flash_attn_func
    window = tuple(None if bound < 0 else bound for bound in case.window)
    return lambda: _first(attention(q, k, v, causal=case.causal, window_size=window))


def fa3_cpp(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The C++ FlashAttention-3: its own package, or else vLLM's build of it."""
    try:
        attention = _module("flash_attn_interface").flash_attn_func
    except Absent:
        return _vllm_fa3(case, q, k, v)
    return lambda: _first(attention(q, k, v, causal=case.causal, window_size=case.window))


def _vllm_fa3(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """vLLM's build has the variable-length form only, as an operator of positional arguments."""
    operator = _load_vllm_fa3()
    b, s, h, d = q.shape
    starts = torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=q.device)
    flat = [x.reshape(b * s, h, d) for x in (q, k, v)]
    left, right = case.window
    arguments = (
        *flat,
        *(None,) * 4,  # k_new, v_new, q_v, out
        *(starts, starts, None),  # cu_seqlens of q, k, k_new
        *(None, None, s, s),  # seqused_q, seqused_k, max_seqlen_q, max_seqlen_k
        *(None,) * 3,  # page_table, kv_batch_idx, leftpad_k
        *(None,) * 3,  # rotary cos, sin, seqlens
        *(None,) * 3,  # descale of q, k, v
        *(d**-0.5, case.causal, left, right, 0.0),  # scale, mask, softcap
        *(True, None, 1, None, 0),  # interleaved rotary, scheduler, num_splits, pack_gqa, sm_margin
        *(None, 1, 0, None),  # sinks, context parallelism
    )
    return lambda: operator(*arguments)[0].view(b, s, h, d)


def _load_vllm_fa3():
    named = os.environ.get("FA3_CPP_LIBRARY")
    places = [Path(named)] if named else [Path(folder) / VLLM_FA3 for folder in sys.path]
    for path in places:
        if path.is_file():
            torch.ops.load_library(str(path))
            return torch.ops._vllm_fa3_C.fwd
    raise Absent(f"neither flash_attn_interface nor {VLLM_FA3} is installed")


def _sdpa(backend: SDPBackend) -> Prepare:
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


BACKENDS: dict[str, Prepare] = {
    "fa3": fa3,
    "fa3-cpp": fa3_cpp,
    "fa4": fa4,
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": _sdpa(SDPBackend.FLASH_ATTENTION),
}
OURS = "fa3"
# whose output the others are compared with: the first of these that runs the case
JUDGES = ("fa2", "cudnn", "fa3-cpp", "fa4")
