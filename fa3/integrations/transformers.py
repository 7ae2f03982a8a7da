"""fa3 as an attention implementation of Hugging Face transformers.

    import fa3.integrations.transformers as hf
    hf.register()
    model = AutoModel.from_pretrained(name, attn_implementation="fa3")

Masks that the kernel does not know (padding, packed sequences, chunks, sliding windows) raise an
error: transformers drops them silently for an attention that registers no mask function.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from fa3 import flash_attn_func

NAME = "fa3"
# what some models pass to an attention function, and what would change its result
UNSUPPORTED = ("sliding_window", "softcap", "head_mask", "s_aux", "position_bias", "cu_seq_lens_q")


def register(name: str = NAME) -> None:
    """Make `attn_implementation=name` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Attention of one layer, as transformers calls it.

    query (b, h_q, s_q, d), key and value (b, h_k, s_k, d) -> out (b, s_q, h_q, d) in query's dtype,
    and None in place of the attention weights. fp32 inputs are computed in fp16.
    """
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"fa3 takes no attention mask, got one of shape {shape}")
    if dropout:
        raise NotImplementedError(f"fa3 has no dropout, got dropout={dropout}")
    for argument in UNSUPPORTED:
        if options.get(argument) is not None:
            raise NotImplementedError(f"fa3's transformers attention has no {argument} yet")

    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", False)
    dtype = torch.float16 if query.dtype == torch.float32 else query.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    out = flash_attn_func(q, k, v, softmax_scale=scaling, causal=causal)
    return out.to(query.dtype), None


def mask(
    mask_function=causal_mask_function,
    attention_mask=None,
    q_length=None,
    kv_length=None,
    **options,
):
    """No mask at all, after checking that none is needed.

    attention_mask (b, tokens), true where a token is real. Raises ValueError for padding and
    NotImplementedError for any pattern but full and causal attention.
    """
    if attention_mask is not None and not attention_mask.all():
        padding = int((~attention_mask.bool()).sum())
        raise ValueError(
            f"fa3 has no padding mask yet, and this batch of shape {tuple(attention_mask.shape)} "
            f"holds {padding} padding tokens: batch sequences of equal length"
        )
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise NotImplementedError(f"fa3 knows full and causal attention, not the mask {name}")
    if mask_function is causal_mask_function:
        _check_bottom_right(q_length, kv_length, options)
    return None


def _check_bottom_right(q_length, kv_length, options) -> None:
    """Causal attention aligns the last query with the last key; a half-filled cache does not."""
    positions = options.get("cache_position")  # of transformers 5.0; later q_length, q_offset
    if positions is not None:
        end = int(positions[-1]) + 1
    else:
        end = q_length + options.get("q_offset", 0)
    last_key = kv_length + options.get("kv_offset", 0)
    if end != last_key:
        raise NotImplementedError(
            f"the last query is at position {end - 1} and the last key at {last_key - 1}: "
            "fa3 needs a cache without free space at its end"
        )
