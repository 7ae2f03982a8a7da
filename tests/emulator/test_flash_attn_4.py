"""Kernels that this project did not write: flash-attn-4's for Hopper, forward and backward."""

import importlib.metadata
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from ..cases import Case
from . import flash_attn_4

CAUSAL = Case(head_dim=128, head_dim_v=128, s_q=150, s_k=200, causal=True)
GROUPED = Case("fp16", h_k=1, s_q=200, s_k=300)


@pytest.fixture(scope="module")
def theirs(emulator):
    """Calls a function of flash_attn_4.py in a process that is ready for it."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn-4 is not installed: pip install fa3[peers]")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def call(function, *args):
            return pool.submit(function, *args).result()

        call(flash_attn_4.prepare)
        yield call


@pytest.mark.slow
@pytest.mark.parametrize("case", [CAUSAL, GROUPED], ids=str)
def test_accuracy(case, theirs):
    kernels = theirs(flash_attn_4.check, case)
    for name in ("FlashAttentionForwardSm90", "FlashAttentionBackwardSm90"):
        assert sum(name in kernel for kernel in kernels) == 1, kernels


def test_schedules(theirs):
    theirs(flash_attn_4.check_schedules, GROUPED, range(2))


def test_what_is_known_is_reported(theirs, emulator):
    """If this fails, flash-attn-4 has changed: KNOWN can be shorter."""
    for check, what in (("uninit", "have not written"), ("global", "no atomic leads from one")):
        with pytest.raises(emulator.KernelError, match=what) as error:
            theirs(flash_attn_4.reported, GROUPED, check)
        assert "flash_bwd_preprocess.py" in str(error.value)
