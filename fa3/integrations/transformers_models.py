"""Which models take part: the refusal of those that cannot, the warning where fa3 is not used."""

import inspect
import sys
import warnings
import weakref

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

# What the forward of a self-attention may take. Else it may be given the keys of other tokens.
OF_SELF_ATTENTION = {
    "args",
    "attention_mask",
    "cache",
    "cache_position",
    "cu_seqlens",
    "hidden_states",
    "kwargs",
    "layer_idx",
    "max_seqlen",
    "output_attentions",
    "past_key_value",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "self",
    "use_cache",
    "value_embeds",
}

_attends_to_itself: dict[type, bool] = {}
_names: set[str] = set()  # of attention implementations that are fa3
_num_calls = 0
_hooks = weakref.WeakKeyDictionary()  # a model that has not run yet -> handles of its hooks
_calls_before = weakref.WeakKeyDictionary()  # a model that is running -> _num_calls at its start


def remedy(instead: str = "sdpa", besides: str = "") -> str:
    """besides: what else helps, with an 'or' at its end."""
    return f'use {besides}attn_implementation="{instead}"'


def refusal(model, reason, instead="sdpa", besides="") -> NotImplementedError:
    """reason: what fa3 lacks, as the rest of a sentence."""
    return NotImplementedError(f"{model}: fa3 {reason}; {remedy(instead, besides)}")


def model_type(config) -> str:
    """The name that messages give a model."""
    return getattr(config, "model_type", None) or type(config).__name__


def name_of(module) -> str:
    """The same, of a layer's attention."""
    config = getattr(module, "config", None)
    own = type(module).__name__
    return own if config is None else f"{model_type(config)} ({own})"


def attends_to_itself(cls) -> bool:
    """Queries and keys are of the same tokens: forward takes nothing that others could be in."""
    known = _attends_to_itself.get(cls)
    if known is None:
        known = set(inspect.signature(cls.forward).parameters) <= OF_SELF_ATTENTION
        if not torch.compiler.is_compiling():
            _attends_to_itself[cls] = known
    return known


def watch(name: str) -> None:
    """Look at every model of this attention implementation that is built from now on."""
    if not _names:
        register_module_module_registration_hook(_on_submodule)
    _names.add(name)


def count_call() -> None:
    global _num_calls
    if not torch.compiler.is_compiling():
        _num_calls += 1


def _on_submodule(module, name, submodule) -> None:
    """A module gets a submodule: for a model that is the first thing after its config."""
    if isinstance(submodule, PreTrainedModel):
        _stop_watching(submodule)
    if not isinstance(module, PreTrainedModel) or module._modules:
        return
    if getattr(module.config, "_attn_implementation", None) not in _names:
        return
    if _computes_by_itself(type(module)):
        raise refusal(
            type(module).__name__,
            "cannot take the place of its attention, which it computes without transformers' "
            "attention interface",
            "sdpa" if module._supports_sdpa else "eager",
        )
    _hooks[module] = (
        module.register_forward_pre_hook(_before_forward),
        module.register_forward_hook(_after_forward),
    )


def _computes_by_itself(cls) -> bool:
    """Its attention is written out, or looked up by name among classes of its own."""
    if not cls._supports_attention_backend and not cls._can_set_attn_implementation():
        return True
    held = vars(sys.modules[cls.__module__]).values() if cls.__module__ in sys.modules else ()
    return any(isinstance(x, dict) and "eager" in x and not _names & x.keys() for x in held)


def _stop_watching(model) -> None:
    for hook in _hooks.pop(model, ()):
        hook.remove()


def _before_forward(model, inputs) -> None:
    is_ours = model.config._attn_implementation in _names  # it may have been changed since
    if is_ours and not torch.compiler.is_compiling():
        _calls_before[model] = _num_calls


def _after_forward(model, inputs, output) -> None:
    if torch.compiler.is_compiling() or model not in _calls_before:
        return
    _stop_watching(model)
    if _calls_before.pop(model) == _num_calls:
        warnings.warn(
            f"{type(model).__name__} was given fa3's attention and did not call it: it has no "
            "attention, or computes it by itself",
            stacklevel=2,
        )
