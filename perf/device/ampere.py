"""The kernels for Ampere, which a Hopper GPU runs with FA3_ARCH=sm_80."""

from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import Signature
from fa3.launch import dispatch, tuning

from ..backends import ampere
from .backward import Backward
from .forward import Forward
from .small import Small

TARGET = dispatch.Target("gpu", "Hopper as sm_80", (8, 0), dispatch.EMULATED_SMS)


class AmpereForward(Forward):
    """A row of passes.PASSES."""

    name = "ampere"
    target = TARGET
    context = staticmethod(ampere.as_ampere)
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
    first_calls = ()

    def signatures(self) -> list[Signature]:
        """None of its own: its cases name them."""
        return []

    def tuned(self) -> list[Signature]:
        return []

    def config(self, signature: Signature):
        return tuning.forward(signature, self.target.capability)


class AmpereBackward(Backward):
    """A row of passes.PASSES."""

    name = "ampere backward"
    target = TARGET
    context = staticmethod(ampere.as_ampere)
    tests = ("tests/test_sm80_backward.py",)
    smalls = (
        Small("bf16", 64, 64, 130, 200, True, h_q=2, h_k=1, seed=1),
        Small("bf16", 128, 128, 150, 100, seed=2),
        Small("fp16", 256, 256, 70, 100, False, (50, 9), seed=3),
    )
    sanitized = smalls[:1]
    repeated = (Small("bf16", 128, 128, 1024, 1024, True, batch=2, h_q=16, h_k=4),)
    first_calls = ()

    def signatures(self) -> list[BwdSignature]:
        return []
