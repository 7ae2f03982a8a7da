"""The attention kernels that the sweep times: pass -> name -> prepare(case, q, k, v) -> call.

`prepare` does everything that is not the kernel (views, lengths, scratch) and returns a call
without arguments that gives out (b, s, h, d). It raises Absent, with the reason, where the backend
is not installed or does not do the case.
"""

from torch.nn.attention import SDPBackend

from ..cases import FORWARD, FORWARD_FP8
from . import forward, fp8
from .common import Absent, Call, Prepare, Scaled

BACKENDS: dict[str, dict[str, Prepare]] = {
    FORWARD: {
        "fa3": forward.fa3,
        "fa3-cpp": forward.fa3_cpp,
        "fa4": forward.fa4,
        "cudnn": forward.sdpa(SDPBackend.CUDNN_ATTENTION),
        "fa2": forward.sdpa(SDPBackend.FLASH_ATTENTION),
    },
    FORWARD_FP8: {
        "fa3": fp8.fa3,
        "fa3-unscaled": fp8.fa3_unscaled,
        "fa3-bf16": fp8.fa3_bf16,
        "fa3-cpp": fp8.fa3_cpp,
        "cudnn": fp8.cudnn,
    },
}
OURS = "fa3"
OWN = (OURS, "fa3-unscaled", "fa3-bf16")  # no peers of ours

__all__ = ["BACKENDS", "OURS", "OWN", "Absent", "Call", "Prepare", "Scaled"]
