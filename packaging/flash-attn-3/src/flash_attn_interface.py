"""The top-level module of FlashAttention-3, computed by fa3."""

from flash_attn_3.flash_attn_interface import *  # noqa: F403
from flash_attn_3.flash_attn_interface import (  # noqa: F401 - programs import these, too
    _flash_attn_backward,
    _flash_attn_forward,
)
