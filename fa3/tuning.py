"""Which FwdConfig a Signature gets: a table, one row per pair of head dim tiles."""

from .kernels.config import FwdConfig
from .kernels.signature import Signature

# (head_dim, head_dim_v): mask kind -> config; "any" serves the kinds without a row of their own.
FORWARD = {
    (64, 64): {"any": FwdConfig(tile_n=128, num_mma_warpgroups=3)},
    (96, 96): {"any": FwdConfig(tile_n=128)},
    (128, 128): {"any": FwdConfig(tile_n=128)},
    (192, 192): {"any": FwdConfig(tile_n=96)},
    (256, 256): {"any": FwdConfig(tile_n=80)},
}


def forward(signature: Signature) -> FwdConfig:
    """The config of the row for both head dims, else that of the larger one, which also fits."""
    widest = max(signature.head_dim, signature.head_dim_v)
    row = FORWARD.get((signature.head_dim, signature.head_dim_v)) or FORWARD[widest, widest]
    return row.get(signature.mask) or row["any"]
