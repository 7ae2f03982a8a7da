"""Importing this module tells DTensor how fa3's attention is sharded: over batch and over heads.

    import fa3.distributed.tensor
    out = fa3.flash_attn_func(q, k, v, causal=True)  # DTensors, sharded alike: nothing is sent

Over heads only where each rank gets whole groups of query heads with their key head, and over the
batch only where tensors have one: packed sequences and pages are sharded over heads.
"""

import itertools
import math

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .. import autograd, ops

_FORWARD = ops.forward._opoverload
_BACKWARD = autograd.backward._opoverload
_BY_SEQUENCE = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")
_BY_HEAD = ("q_descale", "k_descale", "v_descale", "v_shift")  # (batch, heads, ..)


def _names(operator) -> list[str]:
    return [x.name for x in operator._schema.arguments]


@register_sharding(_FORWARD)
def _forward(*arguments, **named):
    given = _named(_FORWARD, arguments, named)
    return _shardings(given, _FORWARD, results=("out", "lse"))


@register_sharding(_BACKWARD)
def _backward(*arguments, **named):
    given = _named(_BACKWARD, arguments, named)
    empty = [] if given.get("with_dq", True) else ["dq"]
    empty += [] if given.get("with_dkv", True) else ["dk", "dv"]
    empty += [] if given.get("learnable_sink") is not None else ["dsink"]
    return _shardings(given, _BACKWARD, ("dq", "dk", "dv", "dsink"), empty)


def _named(operator, arguments, named) -> dict:
    return dict(zip(_names(operator), arguments, strict=False)) | named


def _shardings(given: dict, operator, results, empty=()) -> list[tuple[list, list]]:
    """Pairs of the results' placements and the arguments', over one dimension of a mesh."""
    kinds = ["whole", *(["batch"] if _has_batch(given) else [])]
    if _can_split_heads(given):
        kinds.append("heads")
    found = []
    for kind in kinds:
        outputs = [
            Replicate() if name in empty else _placement(kind, name, given) for name in results
        ]
        inputs = [
            _placement(kind, name, given) if hasattr(given[name], "placements") else None
            for name in _names(operator)
            if name in given
        ]
        found.append((outputs, inputs))
    return found


def _has_batch(given: dict) -> bool:
    packs = ("cu_seqlens_q", "cu_seqlens_k", "page_table")
    return all(given.get(name) is None for name in packs)


def _can_split_heads(given: dict) -> bool:
    """Whether every number of shards that a mesh may make of the key heads gives equal ones.

    More shards than heads DTensor refuses by itself.
    """
    sizes, heads = tuple(given["k"].mesh.shape), given["k"].shape[-2]
    choices = (c for n in range(1, len(sizes) + 1) for c in itertools.combinations(sizes, n))
    return all(heads % math.prod(c) == 0 for c in choices if math.prod(c) <= heads)


def _placement(kind: str, name: str, given: dict):
    """Of an argument or a result, where attention is sharded over batch or heads, or not at all."""
    if kind == "whole":
        return Replicate()
    packed = {side: given.get(f"cu_seqlens_{side}") is not None for side in "qk"}
    if name in _BY_SEQUENCE:
        return Shard(0) if kind == "batch" else Replicate()
    if name in ("learnable_sink", "dsink"):
        has_batch = _sink_has_batch(name, given, packed["q"])
        if kind == "batch":
            return Shard(0) if has_batch else Replicate()
        return Shard(1 if has_batch else 0)
    if name in _BY_HEAD:
        return Shard(0 if kind == "batch" else 1)
    side = "k" if name in ("k", "v", "dk", "dv") else "q"
    if kind == "batch":
        return Shard(0)
    if name in ("lse", "dlse"):
        return Shard(0 if packed["q"] else 1)
    return Shard(1 if packed[side] else 2)


def _sink_has_batch(name: str, given: dict, is_packed: bool) -> bool:
    if name == "dsink":
        return not is_packed
    return len(given["learnable_sink"].shape) > 1
