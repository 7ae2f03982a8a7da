"""exp2 on the FMA and ALU pipes, for loops that wait for the MUFU.

    t = y + 1.5 * 2^23                  rounds y to an integer n, which t holds in its low bits
    f = y - (t - 1.5 * 2^23)            y - n, exact, -0.5 <= f <= 0.5
    p = (c2 * f + c1) * f + c0          2^f
    2^y = p * 2^n                       n moved to where fp32 keeps its exponent

Eight instructions with the clamp, none of them on the MUFU.  The polynomial has the smallest
possible largest relative error of degree 2 (Chebyshev's criterion, solved by reweighted least
squares): 1.73e-3, below 2^-9, where e4m3 rounds by up to 2^-4.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32

COEFFICIENTS = (1.0004431547, 0.7034483080, 0.2384290861)  # c0, c1, c2 of 2^f for |f| <= 0.5
ROUND = 1.5 * 2.0**23  # fp32 near it has a spacing of 1
ONE = 0x3F800000  # bits of 1.0
FRACTION = 23  # fraction bits of fp32
LOWEST = -127.0  # 2^n comes out as 0 for n = -127


def exp2(y: Float32) -> Float32:
    """2^y for y <= 127, relative error 1.73e-3; below -126.5 it is 0, NaN stays NaN."""
    c0, c1, c2 = COEFFICIENTS
    y = cute.arch.fmax(y, LOWEST, nan=True)
    t = y + ROUND
    f = y - (t - ROUND)
    p = (c2 * f + c1) * f + c0
    power = (t.bitcast(Int32) << FRACTION) + ONE
    return p * power.bitcast(Float32)
