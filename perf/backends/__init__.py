"""The attention kernels that the sweep times: pass -> name -> prepare(case, q, k, v) -> call.

`prepare` does everything that is not the kernel (views, lengths, scratch) and returns a call
without arguments that gives out (b, s, h, d), or dq, dk and dv. It raises Absent, with the reason,
where the backend is not installed or does not do the case.
"""

from torch.nn.attention import SDPBackend

from ..cases import BACKWARD, FORWARD, FORWARD_FP8, TRAINING
from . import ampere, forward, fp8, gradients
from .common import Absent, Call, Prepare, Scaled

FA2_OWN = "fa2 (this project)"  # the kernels of Ampere
SIXTEEN_BIT: dict[str, Prepare] = {
    "fa3": forward.fa3,
    FA2_OWN: ampere.fa2,
    "fa3-cpp": forward.fa3_cpp,
    "fa4": forward.fa4,
    "cudnn": forward.sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": forward.sdpa(SDPBackend.FLASH_ATTENTION),
}
OF_GRADIENTS = {
    name: gradients.of(prepare, ampere.as_ampere) if name == FA2_OWN else gradients.of(prepare)
    for name, prepare in SIXTEEN_BIT.items()
}
BACKENDS: dict[str, dict[str, Prepare]] = {
    FORWARD: SIXTEEN_BIT,
    FORWARD_FP8: {
        "fa3": fp8.fa3,
        "fa3-unscaled": fp8.fa3_unscaled,
        "fa3-bf16": fp8.fa3_bf16,
        "fa3-cpp": fp8.fa3_cpp,
        "cudnn": fp8.cudnn,
    },
    BACKWARD: OF_GRADIENTS,
    TRAINING: OF_GRADIENTS,
}
OURS = "fa3"
OWN = (OURS, "fa3-unscaled", "fa3-bf16", FA2_OWN)  # no peers of ours

__all__ = ["BACKENDS", "FA2_OWN", "OURS", "OWN", "Absent", "Call", "Prepare", "Scaled"]
