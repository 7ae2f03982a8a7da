"""FlashAttention-3 for Hopper in CuTe DSL Python; the same kernels run on a CPU in an emulator.

    out = fa3.flash_attn_func(q, k, v, causal=True)
    out = fa3.flash_attn_fp8_func(q, k, v, causal=True)  # the same in FP8
    out = fa3.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)  # packed

Importing this package registers `torch.ops.fa3` and imports neither the CuTe DSL nor the emulator.
"""

import importlib

from .combine import flash_attn_combine
from .interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from .interface_cache import flash_attn_with_kvcache
from .interface_fp8 import flash_attn_fp8_func, flash_attn_varlen_fp8_func
from .metadata import get_scheduler_metadata
from .quantize import Fp8Inputs, quantize_fp8

__version__ = "0.1.0"
__all__ = [
    "Fp8Inputs",
    "emulator",
    "flash_attn_combine",
    "flash_attn_fp8_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_fp8_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "quantize_fp8",
]


def __getattr__(name: str):
    if name == "emulator":
        return importlib.import_module(".emulator", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
