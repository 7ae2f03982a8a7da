"""How large P may become, and how far below that a maximum starts."""

# In log2 of P, by dtype of q.  A score beyond the limit moves its row's maximum and rescales O.
# 16 bits: 1 is a limit that a sign bit tells.  e4m3 ends at 448 = 2^8.8.
LIMIT_LOG2 = {"bf16": 0.0, "fp16": 0.0, "e4m3": 8.75, "int8": 8.75}

# A maximum that moves becomes 2^(limit - headroom).  P keeps all its bits in bf16 at any size; in
# fp16 it starts to lose some below 2^-14, so it must not start far below 1.  In e4m3 it loses some
# below 2^-6 and is gone below 2^-10: a small headroom keeps small weights beside a leading key, at
# the price of more moves (docs/accuracy.md); and a maximum at a power of two is not rounded.
HEADROOM_LOG2 = {"bf16": 8.0, "fp16": 4.0, "e4m3": 2.75, "int8": 2.75}

# A larger shift is not added to the scores in the steady loop: beside it they have less than 11
# fraction bits left, should a later block bring the maximum back.  Rows whose maximum lies so far
# from 0 take the slow way at every step; no model's scores are that large, but a bias that hides
# keys may be.
MAX_SHIFT_LOG2 = 2.0**12
