"""fa3 as an attention implementation of Hugging Face transformers.

    import fa3.integrations.transformers as hf
    hf.register()
    model = AutoModel.from_pretrained(name, attn_implementation="fa3")

Full and causal attention, sliding windows, caches, padded batches and packed sequences;
docs/transformers.md lists the models. What the kernel cannot compute is refused, with the model,
the reason and what to use instead.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from fa3 import flash_attn_func, flash_attn_varlen_func
from fa3.call.problem import MAX_HEAD_DIM

from . import transformers_models as models
from .transformers_mask import UNBOUNDED, Pattern, mask
from .transformers_rows import Packed, Rows

NAME = "fa3"
# Arguments that change nothing in attention: positions are in q and k already, the pattern comes
# from the mask function, and others are meant for the layers around it.
WITHOUT_EFFECT = {
    "cache_position",
    "deterministic",
    "input_ids",
    "is_causal",
    "layer_idx",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
HEAD_DIM_UNIT = 8  # 16 bytes
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def register(name: str = NAME) -> None:
    """Make `attn_implementation=name` known to transformers; calling it again changes nothing.

    From then on a model of that implementation whose class computes attention by itself cannot be
    built: NotImplementedError. It would get no mask.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    models.watch(name)


def attention(  # noqa: PLR0913 - the names are transformers'
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    softcap=None,
    s_aux=None,
    **options,
):
    """Attention of one layer, as transformers calls it.

    query (b, h_q, s_q, d), key (b, h_k, s_k, d) and value (b, h_k, s_k, dv) -> out
    (b, s_q, h_q, dv) in value's dtype, and None in place of the attention weights.
    attention_mask: what `mask` returned, or None: every query sees every key. Rows of out whose
    token is padding are zeros.
    cu_seq_lens_q, cu_seq_lens_k (n + 1,), max_length_q, max_length_k, among the options: packed
    sequences, in the rows of all batch entries one after another.
    softcap, s_aux (h_q,): softcap and learnable_sink of flash_attn_func.

    fp32, and several dtypes together, are computed in bf16, which holds the range of all, or under
    autocast in autocast's dtype. The result is rounded to it.

    Raises:
        NotImplementedError: dropout, a head dim without a kernel, an argument that is not known to
            change nothing, or no mask for several queries of a layer that says it is causal.
        ValueError: a mask that is a tensor, or one for another number of queries or keys; packed
            sequences in part, or in a padded batch.
    """
    models.count_call()
    model = models.name_of(module)
    packing = [options.pop(name, None) for name in PACKING]
    _check_options(model, dropout, options)
    _check_head_dims(model, query.shape[3], value.shape[3])
    pattern = _pattern(model, module, query, key, attention_mask, options)
    packed = _packed(model, pattern, query.shape[0], packing)
    query_rows = _query_rows(model, module, pattern, query.shape[2])
    if pattern.visible != pattern.keys:
        key, value = key[:, :, : pattern.visible], value[:, :, : pattern.visible]
    dtype = _computed_in(query, key, value)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    out = _attend(
        *(q, k, v, packed, query_rows, pattern.key_rows),
        softmax_scale=scaling,
        causal=pattern.causal,
        window_size=pattern.window,
        softcap=softcap or 0.0,
        learnable_sink=None if s_aux is None else s_aux.float(),
    )
    return out.to(value.dtype), None


def _attend(q, k, v, packed: Packed | None, queries: Rows | None, keys: Rows | None, **options):
    """Attention (b, s_q, h_q, dv) of the rows that count; the others are zeros."""
    if packed is not None:
        packed = [x.to(q.device) if isinstance(x, torch.Tensor) else x for x in packed]
        flat = (x.flatten(0, 1) for x in (q, k, v))
        last = packed[0][-1:]  # where the rows of the last sequence end
        out = _zeros_beyond(last, *flat, *packed, **options)
        return out.unflatten(0, q.shape[:2])
    if queries is None and keys is None:
        return flash_attn_func(q, k, v, **options)
    used = {}
    if keys is not None:
        k, v = keys.gather(k), keys.gather(v)
        used["seqused_k"] = keys.lengths.to(q.device)
    dense = None, None, None, None
    if queries is None:
        return flash_attn_varlen_func(q, k, v, *dense, **used, **options)
    used["seqused_q"] = lengths = queries.lengths.to(q.device)
    out = _zeros_beyond(lengths[:, None], queries.gather(q), k, v, *dense, **used, **options)
    return queries.scatter(out)


def _zeros_beyond(end, q, k, v, *lengths, **options):
    """flash_attn_varlen_func (.., rows, h_q, dv), with zeros in the rows from `end` (.., 1) on."""
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        return flash_attn_varlen_func(q, k, v, *lengths, out=out, **options)
    out = flash_attn_varlen_func(q, k, v, *lengths, **options)
    row = torch.arange(q.shape[-3], dtype=end.dtype, device=end.device)
    return out.masked_fill((row >= end)[..., None, None], 0.0)


def _check_options(model: str, dropout: float, options: dict) -> None:
    if dropout:
        raise models.refusal(model, f"has no dropout, got dropout={dropout}")
    if options.get("output_attentions"):
        reason = "returns no attention weights, got output_attentions=True"
        raise models.refusal(model, reason, "eager")
    for name, value in options.items():
        if name not in WITHOUT_EFFECT and name != "output_attentions" and value is not None:
            instead = "sdpa" if name == "position_bias" else "eager"  # sdpa ignores others
            raise models.refusal(model, f"takes no {name}", instead)


def _check_head_dims(model: str, *head_dims: int) -> None:
    for d in head_dims:
        if d > MAX_HEAD_DIM or d % HEAD_DIM_UNIT:
            limits = f"multiples of {HEAD_DIM_UNIT} up to {MAX_HEAD_DIM}"
            raise models.refusal(model, f"takes head dims that are {limits}, got {d}")


def _pattern(model, module, query, key, attention_mask, options) -> Pattern:
    s_q, s_k = query.shape[2], key.shape[2]
    if isinstance(attention_mask, Pattern):
        attention_mask.check_lengths(s_q, s_k, query.shape[0])
        return attention_mask
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        raise ValueError(
            f"{model}: fa3 takes no attention mask that is a tensor, got one of shape {shape}; "
            f"{models.remedy()}"
        )
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", False)
    if causal and s_q > 1:
        reason = "got no mask for a causal layer, where eager attention is full and sdpa's causal"
        raise models.refusal(model, reason, "eager")
    return Pattern(model, s_q, s_k, s_k, causal=False)


def _packed(model: str, pattern: Pattern, batch: int, packing: list) -> Packed | None:
    """packing: the arguments PACKING."""
    missing = [name for name, x in zip(PACKING, packing, strict=True) if x is None]
    if len(missing) == len(PACKING):
        return pattern.packed
    if missing:
        raise ValueError(f"{model}: {', '.join(missing)} missing, expected all of {PACKING}")
    if pattern.query_rows is not None or pattern.key_rows is not None:
        raise ValueError(
            f"{model}: got cu_seq_lens_q and a padded attention_mask or a static cache, expected "
            "packed sequences without them"
        )
    *cu_seqlens, longest_q, longest_k = packing
    # the result does not depend on them; as tensors they would have to be waited for
    longest = (
        batch * n if isinstance(x, torch.Tensor) else x
        for x, n in ((longest_q, pattern.queries), (longest_k, pattern.visible))
    )
    return Packed(*(x.to(torch.int32) for x in cu_seqlens), *longest)


def _query_rows(model: str, module, pattern: Pattern, num_queries: int) -> Rows | None:
    """Whose token is padding, if the mask knows: of keys alone, all queries count."""
    if pattern.causal or pattern.key_rows is None:
        return pattern.query_rows
    if num_queries == pattern.keys and models.attends_to_itself(type(module)):
        return pattern.key_rows
    if pattern.window != UNBOUNDED:
        reason = "has no sliding windows over padded keys that may be of other tokens"
        raise models.refusal(model, reason)
    return None


def _computed_in(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of the products."""
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) == 1 and torch.float32 not in dtypes:
        return tensors[0].dtype
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if dtype in SIXTEEN_BIT:
            return dtype
    return torch.bfloat16
