"""How far a score may exceed its row's maximum before the maximum moves and O is rescaled."""

# In log2 of P, by dtype.  P keeps all its bits in bf16 at any size; in fp16 it starts to lose some
# below 2^-14, so it must not start far below 1.
HEADROOM_LOG2 = {"bf16": 8.0, "fp16": 4.0}
