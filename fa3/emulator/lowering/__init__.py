"""Instructions -> Python/numpy source, one function per straight-line segment, made when first run.

segments.py cuts the code into segments; emitter.py turns operands into source text; each of the
other modules lowers one family of instructions, with functions registered by opcode.
"""

from . import (  # noqa: F401 - they register their instructions
    arithmetic,
    bits,
    bulk,
    control,
    matrix,
    memory,
    moves,
    synchronisation,
    warp,
)
from .segments import Form, Lowered, lower

__all__ = ["Form", "Lowered", "lower"]
