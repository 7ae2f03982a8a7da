"""How large P may become, and how far below that a maximum starts."""

# In log2 of P, by dtype of q.  A score beyond the limit moves its row's maximum and rescales O.
# 16 bits: 1 is a limit that a sign bit tells.  e4m3 ends at 448 = 2^8.8.
LIMIT_LOG2 = {"bf16": 0.0, "fp16": 0.0, "e4m3": 8.75, "int8": 8.75}

# A maximum that moves becomes 2^(limit - headroom).  P keeps all its bits in bf16 at any size; in
# fp16 it starts to lose some below 2^-14, in e4m3 below 2^-6, so it must not start far below 1.
HEADROOM_LOG2 = {"bf16": 8.0, "fp16": 4.0, "e4m3": 4.75, "int8": 4.75}
