"""What the arguments of other attention functions are called here."""

import difflib
import inspect
from collections.abc import Callable

_SCALE = "softmax_scale is meant"
_MASK = "causal and window_size say what is masked, and there are no other masks"
_NO_DROPOUT = "there is no dropout, so leave it out"
_GQA = "leave it out: q may always have more heads than k and v"
_LENGTHS = (
    "flash_attn_varlen_func and flash_attn_varlen_fp8_func take sequences of different lengths"
)
_CACHE = "flash_attn_with_kvcache takes caches"
_PAGES = "page_table is meant, of flash_attn_with_kvcache and flash_attn_varlen_func"
_LSE = "return_attn_probs=True returns the lse, too"

HINTS = {
    "is_causal": "causal is meant",
    **dict.fromkeys(("scale", "scaling", "sm_scale", "attn_scale", "softmax_scaling"), _SCALE),
    **dict.fromkeys(
        ("attn_mask", "attention_mask", "mask", "attn_bias", "key_padding_mask"), _MASK
    ),
    **dict.fromkeys(("bias", "alibi_slopes", "score_mod", "mask_mod", "block_mask"), _MASK),
    **dict.fromkeys(("dropout_p", "dropout"), _NO_DROPOUT),
    "enable_gqa": _GQA,
    "sliding_window": "window_size=(sliding_window - 1, 0) is meant",
    "window_size_left": "window_size=(left, right) is meant",
    "window_size_right": "window_size=(left, right) is meant",
    "window_left": "window_size=(left, right) is meant",
    **dict.fromkeys(("logits_soft_cap", "logit_cap", "attn_logit_softcapping"), "softcap is meant"),
    **dict.fromkeys(("return_lse", "return_softmax_lse", "return_softmax"), _LSE),
    "descale_q": "q_descale is meant",
    "descale_k": "k_descale is meant",
    "descale_v": "v_descale is meant",
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), _LENGTHS),
    **dict.fromkeys(("seqused_q", "seqused_k"), _LENGTHS),
    "leftpad_k": "cache_leftpad is meant, of flash_attn_with_kvcache",
    **dict.fromkeys(("k_cache", "v_cache", "cache_seqlens", "cache_batch_idx"), _CACHE),
    **dict.fromkeys(("page_table", "block_table", "block_tables"), _PAGES),
    **dict.fromkeys(("s_aux", "sinks", "sink"), "learnable_sink is meant"),
    "num_heads": "num_heads_q is meant",
    "num_heads_k": "num_heads_kv is meant",
}
PACKED = "flash_attn_varlen_func takes packed sequences"
ORDER = (
    "the order is FlashAttention-3's: q, k, v, softmax_scale, causal; neither a mask nor "
    "FlashAttention-2's dropout_p comes after v"
)


def closed(function: Callable) -> Callable:
    """Leave `**unknown`, which catches arguments by wrong names, out of the visible signature."""
    signature = inspect.signature(function)
    known = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=known)
    return function


def unknown_argument(function: Callable, name: str) -> TypeError:
    parameters = inspect.signature(function).parameters
    hint = HINTS.get(name)
    if hint is None:
        close = difflib.get_close_matches(name, parameters, n=1, cutoff=0.8)
        hint = f"{close[0]} is meant?" if close else f"it has {', '.join(parameters)}"
    return TypeError(f"{function.__name__}() has no argument {name!r}: {hint}")
