"""Arithmetic that means the same on Python ints (host, tests) and on the DSL's Int32 (kernels).

Divide only what is not negative: Python's // rounds down, the device's rounds to zero.
"""

import cutlass


def _is_plain(*values) -> bool:
    return all(isinstance(v, int) for v in values)


def minimum(a, b):
    return min(a, b) if _is_plain(a, b) else cutlass.min(a, b)


def maximum(a, b):
    return max(a, b) if _is_plain(a, b) else cutlass.max(a, b)


def clamp(x, low, high):
    """x, but at least low and at most high; high wins where they cross."""
    return minimum(maximum(x, low), high)


def ceil_div(a, b):
    return (a + b - 1) // b
