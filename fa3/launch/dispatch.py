"""Where a call runs and which kernel it gets, or why it gets none."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..kernels.bwd_signature import BwdSignature
from ..kernels.signature import Signature

# An emulated launch runs as on an H100 or H200, whose CTAs it works off one after another.
EMULATED_SMS = 132
# FA3_ARCH -> compute capability
ARCHITECTURES = {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0)}
# Those beyond 9.x that the DSL compiles for: they run the kernels for 8.x, which need nothing else.
NEWER = (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)
_NEWER = ", ".join(f"{major}.{minor}" for major, minor in NEWER)
CAPABILITIES = f"9.x, 8.x or one of {_NEWER}"  # that some kernel runs on


class Target(NamedTuple):
    """What executes a kernel."""

    kind: str  # gpu, emulator or reference (plain torch, no kernel at all)
    name: str
    capability: tuple[int, int]
    num_sms: int
    arch: str = "sm_90a"  # what its kernels are compiled for


@dataclass(frozen=True)
class Kernel:
    """One row of the table."""

    name: str
    where: str  # "module:name" of what makes the kernel, imported only when it is compiled
    why_not: Callable[[Any, Target], str | None]  # None: it serves the signature


def _why_not_sm90(signature: Signature, target: Target) -> str | None:
    if signature.quantised or signature.widens:
        return _why_not_hopper(target) or "it takes 16-bit inputs"
    return _why_not_hopper(target)


def _why_not_widened_sm90(signature: Signature, target: Target) -> str | None:
    is_right = signature.widens is not None
    return _why_not_hopper(target) or (None if is_right else "it takes one-byte k and v")


def _why_not_fp8_sm90(signature: Signature, target: Target) -> str | None:
    return _why_not_hopper(target) or (None if signature.quantised else "it takes one-byte inputs")


def _why_not_backward_sm90(signature: BwdSignature, target: Target) -> str | None:
    return _why_not_hopper(target)


def _why_not_sm80(signature: Signature, target: Target) -> str | None:
    reason = _why_not_fallback(target)
    if reason:
        return reason
    if signature.quantised or signature.widens:
        return (
            f"{target.name} has no kernel for FP8: give q, k and v in bf16 or fp16, multiplied by "
            "their scales"
        )
    if signature.page_rows:
        return f"{target.name} has no kernel for pages: gather the keys, or give dense caches"
    return None


def _why_not_backward_sm80(signature: BwdSignature, target: Target) -> str | None:
    return _why_not_fallback(target)


def _why_not_fallback(target: Target) -> str | None:
    if target.capability[0] == 8 or target.capability in NEWER:
        return None
    return _needs(f"8.x or one of {_NEWER}", target)


def _why_not_hopper(target: Target) -> str | None:
    return None if target.capability[0] == 9 else _needs("9.x", target)


def _needs(capability: str, target: Target) -> str:
    major, minor = target.capability
    return f"it needs compute capability {capability}, {target.name} has {major}.{minor}"


_SM90 = "fa3.kernels.sm90.forward"
FORWARD = (
    Kernel("forward sm90", f"{_SM90}.operands_16bit:forward", _why_not_sm90),
    Kernel("FP8 forward sm90", f"{_SM90}.operands_fp8:forward", _why_not_fp8_sm90),
    Kernel("widening forward sm90", f"{_SM90}.operands_widened:forward", _why_not_widened_sm90),
    Kernel("forward sm80", "fa3.kernels.sm80.forward.kernel:forward", _why_not_sm80),
)
BACKWARD = (
    Kernel(
        "backward sm90", "fa3.kernels.sm90.backward.kernel:BackwardSm90", _why_not_backward_sm90
    ),
    Kernel(
        "backward sm80", "fa3.kernels.sm80.backward.kernel:BackwardSm80", _why_not_backward_sm80
    ),
)


def forward(signature: Signature, target: Target) -> Kernel:
    """The first kernel of the table that serves this case.

    Raises:
        NotImplementedError: none does; the message lists every kernel with its reason.
    """
    return _first(FORWARD, signature, target)


def backward(signature: BwdSignature, target: Target) -> Kernel:
    """As `forward`."""
    return _first(BACKWARD, signature, target)


def _first(table, signature, target: Target) -> Kernel:
    reasons = []
    for kernel in table:
        reason = kernel.why_not(signature, target)
        if reason is None:
            return kernel
        reasons.append(f"\n  {kernel.name}: {reason}")
    raise NotImplementedError(f"no kernel for {signature} on {target.name}:{''.join(reasons)}")


@functools.cache
def target_of(device: torch.device) -> Target:
    """What runs a tensor on `device`.

    `FA3_CPU` and `FA3_ARCH` are read when the first tensor comes. FA3_ARCH says what the emulator
    is, and a Hopper GPU runs the kernels for 8.x where it names one.
    """
    arch = os.environ.get("FA3_ARCH")
    if arch is not None and arch not in ARCHITECTURES:
        raise ValueError(f"FA3_ARCH is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    if device.type == "cuda":
        return _gpu(torch.cuda.get_device_properties(device), arch)
    kind = os.environ.get("FA3_CPU", "reference")
    if kind == "reference":
        return Target("reference", "CPU", (0, 0), 1)
    if kind != "emulate":
        raise ValueError(f"FA3_CPU is {kind!r}, expected 'reference' or 'emulate'")
    from .. import emulator

    arch = arch or "sm_90a"
    emulator.install(arch)  # before anything imports cutlass
    return Target("emulator", f"emulated {arch}", ARCHITECTURES[arch], EMULATED_SMS, arch)


def _gpu(properties, arch: str | None) -> Target:
    """arch: FA3_ARCH."""
    name, num_sms = properties.name, properties.multi_processor_count
    major, minor = properties.major, properties.minor
    if major != 9:
        return Target("gpu", name, (major, minor), num_sms, f"sm_{major}{minor}")
    capability = ARCHITECTURES[arch] if arch else (major, minor)
    if capability[0] != 9:
        name = f"{name} as {arch}"
    return Target("gpu", name, capability, num_sms)
