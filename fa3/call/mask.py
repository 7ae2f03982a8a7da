"""MaskSpec: which mask a call asks for; the only place that says so."""

from typing import NamedTuple

from ..kernels.signature import UNBOUNDED, MaskKind


class MaskSpec(NamedTuple):
    """The kind, for which a kernel is compiled, and the two bounds, which it is told.

    The kind never depends on lengths, or they would recompile.
    """

    kind: MaskKind
    left: int = UNBOUNDED  # keys before a query's own that it sees
    right: int = UNBOUNDED  # keys after it

    @classmethod
    def of(cls, causal: bool, left: int, right: int) -> "MaskSpec":
        """Of the arguments causal and window_size, where a bound below 0 is none."""
        if causal:
            right = 0
        if left < 0 and right < 0:
            return cls("full")
        if left < 0 and right == 0:
            return cls("causal")
        return cls("local", *(UNBOUNDED if x < 0 else min(x, UNBOUNDED) for x in (left, right)))
