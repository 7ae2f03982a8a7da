"""flash-attn-4 on the emulator: its own Python interface, called with CPU tensors.

For a process of its own: prepare() makes all CPU tensors look like CUDA tensors, and quack, which
flash-attn-4 uses, patches the DSL's tensors.
"""

from __future__ import annotations

import functools
import os
import sys
import types

import torch

from fa3 import emulator

from .. import reference
from ..accuracy import assert_accurate, assert_lse
from ..cases import Case, make_inputs
from ..conftest import SEED

# Checks that are off in the kernel that prepares the backward pass, for what it does on purpose.
# uninit: rows after the last query are computed with as they are, and dropped.
# global: it has 256 threads for tiles of 64 or 128 rows. Those after its tile write the logarithms
#         of the next tile, which another CTA writes, too: the same numbers.
KNOWN = {"_bwd_preprocess": ("uninit", "global")}


def prepare() -> None:
    """Make the interface of flash-attn-4 take CPU tensors, for the emulator's Hopper."""
    os.environ["FLASH_ATTENTION_ARCH"] = "sm_90"  # else it asks the driver
    os.environ["FLASH_ATTENTION_NUM_SMS"] = "132"
    emulator.install()
    emulator.configure(checks=emulator.ALL_CHECKS)
    torch.set_num_threads(1)
    torch.Tensor.is_cuda = property(lambda self: True)
    _stand_in_for_triton()
    import flash_attn.cute.interface as interface

    for name, checks in KNOWN.items():
        setattr(interface, name, _without(checks, getattr(interface, name)))


def _stand_in_for_triton() -> None:
    """quack imports triton for autotuning, which nothing here does; torch for CPUs has none."""
    import torch._dynamo  # noqa: F401 - it looks for triton, and must not find the stand-in

    try:
        import triton  # noqa: F401
    except ImportError:
        cache = types.SimpleNamespace(FileCacheManager=object)
        triton = types.ModuleType("triton")
        triton.runtime = types.SimpleNamespace(cache=cache)
        sys.modules["triton"] = triton


def _without(checks, function):
    @functools.wraps(function)
    def called(*args, **kwargs):
        others = tuple(c for c in emulator.ALL_CHECKS if c not in checks)
        with emulator.options(checks=others):
            return function(*args, **kwargs)

    return called


def _inputs(case: Case) -> list[torch.Tensor]:
    torch.manual_seed(SEED)
    return [x.tensor.requires_grad_() for x in make_inputs(case, torch.device("cpu"))]


def attend(case: Case, q, k, v):
    """(out, lse) of flash-attn-4; out can be differentiated."""
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q, k, v, causal=case.causal, return_lse=True)


def check(case: Case) -> list[str]:
    """Compare output and gradients with fp32; returns the names of the kernels that ran."""
    del emulator.launches[:]
    inputs = _inputs(case)
    out, lse = attend(case, *inputs)
    exact, exact_lse = reference.exact(*inputs, **case.mask)
    baseline = reference.baseline(*inputs, **case.mask)
    assert_accurate("out", out, exact, baseline)
    assert_lse("lse", lse, exact_lse)
    dout = torch.randn_like(out)
    gradients = (torch.autograd.grad(x, inputs, dout) for x in (out, exact, baseline))
    for name, *results in zip(("dq", "dk", "dv"), *gradients, strict=True):
        assert_accurate(name, *results)
    return [launch["kernel"] for launch in emulator.launches]


def check_schedules(case: Case, seeds) -> None:
    """The output must be the same to the bit under eager, late and random schedules."""
    inputs = [x.detach() for x in _inputs(case)]
    emulator.compare_schedules(lambda: attend(case, *inputs), seeds=seeds)


def reported(case: Case, check: str) -> None:
    """A backward pass with a check of KNOWN in all kernels: raises what it reports."""
    import flash_attn.cute.interface as interface

    inputs = _inputs(case)
    with emulator.options(checks=(check,)):
        ours = interface._bwd_preprocess
        try:
            interface._bwd_preprocess = ours.__wrapped__
            attend(case, *inputs)[0].sum().backward()
        finally:
            interface._bwd_preprocess = ours
