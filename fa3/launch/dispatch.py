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


class Target(NamedTuple):
    """What executes a kernel."""

    kind: str  # gpu, emulator or reference (plain torch, no kernel at all)
    name: str
    capability: tuple[int, int]
    num_sms: int


@dataclass(frozen=True)
class Kernel:
    """One row of the table."""

    name: str
    where: str  # "module:name" of what makes the kernel, imported only when it is compiled
    why_not: Callable[[Any, Target], str | None]  # None: it serves the signature


def _why_not_sm90(signature: Signature, target: Target) -> str | None:
    return _why_not_hopper(target) or ("it takes 16-bit inputs" if signature.quantised else None)


def _why_not_fp8_sm90(signature: Signature, target: Target) -> str | None:
    return _why_not_hopper(target) or (None if signature.quantised else "it takes one-byte inputs")


def _why_not_backward_sm90(signature: BwdSignature, target: Target) -> str | None:
    return _why_not_hopper(target)


def _why_not_hopper(target: Target) -> str | None:
    if target.capability[0] != 9:
        major, minor = target.capability
        return f"it needs compute capability 9.x, {target.name} has {major}.{minor}"
    return None


_SM90 = "fa3.kernels.sm90.forward"
FORWARD = (
    Kernel("forward sm90", f"{_SM90}.operands_16bit:forward", _why_not_sm90),
    Kernel("FP8 forward sm90", f"{_SM90}.operands_fp8:forward", _why_not_fp8_sm90),
)
BACKWARD = (
    Kernel(
        "backward sm90", "fa3.kernels.sm90.backward.kernel:BackwardSm90", _why_not_backward_sm90
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
    """What runs a tensor on `device`; `FA3_CPU` is read when the first CPU tensor comes."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        return Target("gpu", properties.name, capability, properties.multi_processor_count)
    kind = os.environ.get("FA3_CPU", "reference")
    if kind == "reference":
        return Target("reference", "CPU", (0, 0), 1)
    if kind != "emulate":
        raise ValueError(f"FA3_CPU is {kind!r}, expected 'reference' or 'emulate'")
    from .. import emulator

    emulator.install()  # before anything imports cutlass
    return Target("emulator", "emulated sm_90a", (9, 0), EMULATED_SMS)
