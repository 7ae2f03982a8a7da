"""The kernels for Ampere, which a Hopper GPU runs with FA3_ARCH=sm_80."""

from fa3.launch import dispatch

from ..backends import ampere
from .backward import Backward
from .forward import Forward, NamedByCases
from .small import Small

TARGET = dispatch.Target("gpu", "Hopper as sm_80", (8, 0), dispatch.EMULATED_SMS)


class AsAmpere(NamedByCases):
    """What the rows below have in common."""

    target = TARGET
    context = staticmethod(ampere.as_ampere)
    first_calls = ()


class AmpereForward(AsAmpere, Forward):
    """A row of passes.PASSES."""

    name = "ampere"
    tests = ("tests/test_sm80.py",)
    smalls = (
        Small("bf16", 64, 64, 130, 200, True, h_q=2, h_k=1, seed=1),
        Small("fp16", 96, 96, 200, 150, seed=2),
        Small("bf16", 128, 128, 70, 333, False, (50, 9), seed=3),
        Small("bf16", 192, 128, 97, 150, True, seed=4),
        Small("bf16", 256, 256, 100, 120, seed=5),
    )
    sanitized = smalls[:2]
    repeated = (Small("bf16", 128, 128, 1999, 2111, True, batch=2, h_q=16, h_k=4),)


class AmpereBackward(AsAmpere, Backward):
    """A row of passes.PASSES."""

    name = "ampere backward"
    tests = ("tests/test_sm80_backward.py",)
    smalls = (
        Small("bf16", 64, 64, 130, 200, True, h_q=2, h_k=1, seed=1),
        Small("bf16", 128, 128, 150, 100, seed=2),
        Small("fp16", 256, 256, 70, 100, False, (50, 9), seed=3),
    )
    sanitized = smalls[:1]
    repeated = (Small("bf16", 128, 128, 1024, 1024, True, batch=2, h_q=16, h_k=4),)
