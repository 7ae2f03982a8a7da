"""vLLM's build of the C++ FlashAttention-3: variable-length only, an operator of 37 arguments."""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..cases import Case
from .common import Absent, Call

LIBRARY = "_vllm_fa3_C.abi3.so"  # looked for on sys.path; FA3_CPP_LIBRARY names another place


def call(case: Case, q: Tensor, k: Tensor, v: Tensor, descale: Tensor | None = None) -> Call:
    """descale: of q, k and v, (b, h)."""
    if case.gradients:
        raise Absent("vLLM's build of it has no backward pass")
    operator = _load()
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
        *(descale,) * 3,  # of q, k, v
        *(d**-0.5, case.causal, left, right, 0.0),  # scale, mask, softcap
        *(True, None, 1, None, 0),  # interleaved rotary, scheduler, num_splits, pack_gqa, sm_margin
        *(None, 1, 0, None),  # sinks, context parallelism
    )
    return lambda: operator(*arguments)[0].view(b, s, h, d)


def _load():
    named = os.environ.get("FA3_CPP_LIBRARY")
    places = [Path(named)] if named else [Path(folder) / LIBRARY for folder in sys.path]
    for path in places:
        if path.is_file():
            torch.ops.load_library(str(path))
            return torch.ops._vllm_fa3_C.fwd
    raise Absent(f"neither flash_attn_interface nor {LIBRARY} is installed")
