"""transformers' own code for FlashAttention-3, on CPU tensors and without a package to find.

transformers asks for a module `flash_attn_interface`, a distribution that owns it, and a GPU. Here
it is told that all are there.
"""

import contextlib
import importlib.machinery
import sys
import types
from unittest import mock

import fa3

NAME = "flash_attention_3"
FUNCTIONS = {
    name: getattr(fa3, name)
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
}


@contextlib.contextmanager
def found(functions: dict | None = None):
    """attn_implementation="flash_attention_3" is fa3, or these of its functions by name."""
    from transformers import modeling_flash_attention_utils as utils

    module = types.ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    vars(module).update(FUNCTIONS | (functions or {}))
    there = {
        "general_availability_check": lambda *arguments, **options: True,
        "pkg_availability_check": lambda *arguments, **options: True,
        "supported_devices": ((lambda: True, "cpu"),),
        "cuda_min_major_version": None,
    }
    matrix = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    with (
        _importable(module),
        mock.patch.dict(matrix[3], there),
        mock.patch.object(utils, "is_flash_attn_3_available", lambda *a, **b: True),
        mock.patch.object(utils, "_loaded_implementation", None),
    ):
        yield


@contextlib.contextmanager
def _importable(module):
    """Others that are imported meanwhile stay."""
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
