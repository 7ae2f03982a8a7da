"""PASSES: what every step runs over. A new kernel or pass is one more row.

A row names its kernels (signatures), their configs, its small problems and its tests; the steps
know nothing else of it.
"""

from .ampere import AmpereBackward, AmpereForward
from .backward import Backward
from .forward import Forward
from .forward_fp8 import ForwardFp8, OneCall
from .ragged import Paged, Ragged, RaggedBackward, Split

PASSES = (
    Forward(),
    ForwardFp8(),
    Backward(),
    OneCall(),
    Ragged(),
    RaggedBackward(),
    Paged(),
    Split(),
    AmpereForward(),
    AmpereBackward(),
)
