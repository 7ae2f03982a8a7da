"""fa3 in place of torch's own attention kernels, until it is switched off again.

    from fa3.integrations.torch import activate, deactivate, report

    activate()
    F.scaled_dot_product_attention(q, k, v, is_causal=True)  # fa3, forward and backward
    print(report())

torch calls fa3 from F.scaled_dot_product_attention, nn.MultiheadAttention, varlen_attn, nested
tensors and context_parallel, on GPUs of compute capability 8.x and 9.x. What fa3 does not compute
goes to the kernel that torch had; docs/torch.md says what that is.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from inspect import Parameter, signature

import torch
from torch.library import Library

from .torch_calls import Unserved
from .torch_operators import CPU_OPERATORS, OPERATORS

NAME = "FA3"  # as programs like torchtitan ask for it
SERVED = "fa3"
_calls: Counter[tuple[str, str]] = Counter()  # (operator, SERVED or the reason why not)
_previous: Callable | None = None  # what was registered under NAME, while ours is


def activate(*, cpu: bool = False) -> None:
    """Have torch's attention computed by fa3, and count calls anew.

    cpu: the operators of CPU tensors, too: the emulator or the reference, as FA3_CPU says. A way to
        try it without a GPU.

    Same as `register` and torch.nn.attention.activate_flash_attention_impl("FA3"): another
    implementation that is active gives way.

    Raises:
        RuntimeError: this torch has no registry of attention implementations; nothing is changed.
    """
    register(cpu=cpu)
    _calls.clear()
    _registry().activate_flash_attention_impl(NAME)


def deactivate() -> None:
    """Give torch back its kernels, and its own "FA3"; nothing happens if fa3 is not active."""
    global _previous
    registry = _registry()
    if isinstance(_active_handle(registry), _Handle):
        registry.restore_flash_attention_impl(_raise_warn=False)
    if _is_registered(registry):
        if _previous is None:
            del registry._FLASH_ATTENTION_IMPLS[NAME]
        else:
            registry.register_flash_attention_impl(NAME, register_fn=_previous)
        _previous = None


def register(*, cpu: bool = False) -> None:
    """Let torch.nn.attention.activate_flash_attention_impl("FA3") find fa3 instead of flash-attn.

    For programs that call it themselves. Arguments and errors are those of `activate`.
    """
    global _previous
    registry = _registry()
    if not _is_registered(registry):
        _previous = registry._FLASH_ATTENTION_IMPLS.get(NAME)
    registry.register_flash_attention_impl(NAME, register_fn=_Installer(cpu))


def report() -> dict[str, dict[str, int]]:
    """How many calls of each aten operator fa3 computed, under "fa3", and how many torch did, by
    the reason; since `activate`."""
    found: dict[str, dict[str, int]] = {}
    for (operator, outcome), count in sorted(_calls.items()):
        found.setdefault(operator, {})[outcome] = count
    return found


class _Installer:
    """What torch calls to activate fa3."""

    def __init__(self, cpu: bool):
        self.cpu = cpu

    def __call__(self) -> "_Handle":
        return _Handle(self.cpu)


class _Handle:
    """The operators as overridden; torch calls `remove` to get its own back."""

    def __init__(self, cpu: bool):
        self.library = Library("aten", "IMPL")
        self.took_fp8 = _takes_fp8()
        for name, function in OPERATORS.items():
            self._override(name, function, "CUDA")
        if cpu:
            for name, function in (OPERATORS | CPU_OPERATORS).items():
                self._override(name, function, "CPU")
        _set_takes_fp8(True)

    def remove(self) -> None:
        self.library._destroy()
        _set_takes_fp8(self.took_fp8)

    def _override(self, name: str, function: Callable, key: str) -> None:
        problem = _why_unknown(name, function)
        if problem is not None:
            warnings.warn(f"aten::{name} stays torch's own: {problem}", stacklevel=2)
            return
        kernel = _Kernel(name, function, _kernel_of_torch(name, key))
        self.library.impl(name, kernel, key, with_keyset=True)


class _Kernel:
    """fa3's function, and torch's kernel for what it does not compute."""

    def __init__(self, name: str, function: Callable, original):
        self.name, self.function, self.original = name, function, original

    def __call__(self, keyset, *arguments, **options):
        try:
            results = self.function(*arguments, **options)
        except Unserved as error:
            reason = str(error)
        else:
            _calls[self.name, SERVED] += 1
            return results
        if self.original is None:
            raise NotImplementedError(
                f"aten::{self.name}: {reason}, which fa3 does not compute, and torch has no kernel "
                "for this device"
            )
        _calls[self.name, reason] += 1
        return self.original.call_boxed(keyset, *arguments, **options)


def _kernel_of_torch(name: str, key: str):
    """torch's own, None if it has none for this device."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
        return None
    return torch.library.get_kernel(f"aten::{name}", key)


def _why_unknown(name: str, function: Callable) -> str | None:
    """How the operator differs in this torch from what the function expects, if it does."""
    try:
        schema = torch._C._get_schema(*f"aten::{name}.".split(".")[:2])
    except RuntimeError:
        return f"torch {torch.__version__} has no such operator"
    known = signature(function).parameters
    given = [x.name for x in schema.arguments]
    unknown = [x for x in given if x not in known]
    needed = [x.name for x in known.values() if x.default is Parameter.empty]
    missing = [x for x in needed if x not in given]
    if unknown or missing:
        names = ", ".join(unknown + missing)
        return f"in torch {torch.__version__} it differs in {names} from what fa3 knows"
    return None


def _takes_fp8() -> bool:
    """Whether F.scaled_dot_product_attention gives FP8 tensors to the flash operator."""
    return hasattr(torch._C, "_get_fa3_sdp_enabled") and torch._C._get_fa3_sdp_enabled()


def _set_takes_fp8(on: bool) -> None:
    if hasattr(torch._C, "_set_sdp_use_fa3"):
        torch._C._set_sdp_use_fa3(on)


def _registry():
    try:
        from torch.nn.attention import _registry as registry

        _ = registry._FLASH_ATTENTION_IMPLS, registry._FLASH_ATTENTION_ACTIVE
        _ = torch.library.get_kernel
    except (ImportError, AttributeError):
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of attention implementations "
            "(torch.nn.attention.register_flash_attention_impl), so that its attention stays its "
            "own: call fa3.flash_attn_func, or use a newer torch"
        ) from None
    return registry


def _active_handle(registry):
    active = registry._FLASH_ATTENTION_ACTIVE
    return None if active is None else active[1]


def _is_registered(registry) -> bool:
    return isinstance(registry._FLASH_ATTENTION_IMPLS.get(NAME), _Installer)
