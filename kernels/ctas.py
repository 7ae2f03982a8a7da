"""How many CTAs a list of tiles is for."""

MAX_CTAS = 384  # that it has room for: two on each of 192 SMs
HOPPER_CTAS = 160  # that it is dealt to, of kernels of Hopper; no such GPU has more than 144 SMs
