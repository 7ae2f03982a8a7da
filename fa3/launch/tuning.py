"""Which config a signature gets: tables, one row per pair of head dim tiles."""

from dataclasses import replace

from ..kernels.bwd_config import BwdConfig
from ..kernels.bwd_signature import BwdSignature
from ..kernels.config import SMEM_LIMIT, FwdConfig
from ..kernels.signature import Signature
from ..kernels.sm80.bwd_config import Sm80BwdConfig
from ..kernels.sm80.config import SMEM_OF_SM, Sm80Config

AnyBwdConfig = BwdConfig | Sm80BwdConfig

# (head_dim, head_dim_v): mask kind -> config; "any" serves the kinds without a row of their own.
#
# Chosen by what `python -m fa3 inspect` predicts for the steady loop (TFLOPs/s at bf16 in the
# comment; no GPU has confirmed any of it) and by what wider tiles waste: key blocks at the diagonal
# and at the end of the keys, and the separate buffer for O that lets the next tile's loads begin
# early.
FORWARD = {
    (64, 64): {"any": FwdConfig(tile_n=128, num_mma_warpgroups=3, num_stages=4)},  # 559
    (96, 96): {
        "full": FwdConfig(tile_n=176),  # 641
        "any": FwdConfig(tile_n=128),  # 641
    },
    (128, 128): {
        "full": FwdConfig(tile_n=176),  # 692; 691 at 160, 689 at 128, which issues more per score
        "any": FwdConfig(tile_n=128),  # 690
    },
    (192, 128): {"any": FwdConfig(tile_n=112)},  # 725
    (192, 192): {"any": FwdConfig(tile_n=80)},  # 747; 749 at 96, where O and Q share a buffer
    (256, 256): {
        "any": FwdConfig(tile_n=80),  # 781
        "gathered": FwdConfig(tile_n=80, spared_registers=8),  # else the gathering warps spill
    },
}

# The same for one-byte inputs; figures of e4m3, one scale per head (of "blocks", per block), and
# with the transpose of V beside.  A row that serves the blocks of v of a call must have a tile_n
# that divides them; else "blocks" does.
FORWARD_FP8 = {
    (64, 64): {
        "full": FwdConfig(tile_n=96, num_mma_warpgroups=3, num_stages=3),  # 599
        # Where masks differ between tiles, the transposing warps would spill.
        "any": FwdConfig(tile_n=96, num_mma_warpgroups=3, num_stages=3, spared_registers=8),
        "blocks": FwdConfig(tile_n=128, num_stages=3),  # 539
    },
    (96, 96): {
        "any": FwdConfig(tile_n=128),  # 757
        "split": FwdConfig(tile_n=128, spared_registers=8),  # else the transposing warps spill
    },
    (128, 128): {"any": FwdConfig(tile_n=128)},  # 855
    (192, 128): {"any": FwdConfig(tile_n=128)},  # 985
    (192, 192): {"any": FwdConfig(tile_n=128, o_slice=64)},  # 890
    (256, 256): {
        "any": FwdConfig(tile_n=96, o_slice=64),  # 921
        "blocks": FwdConfig(tile_n=64, o_slice=64),  # 818
        # Fetched tiles or gathered rows beside, the transposing warps spill.
        "ragged local": FwdConfig(tile_n=96, o_slice=64, schedule="static"),
        "gathered local": FwdConfig(tile_n=64, o_slice=64),
    },
}

# The same for 16-bit q beside one-byte k and v, which lie in shared memory twice.  In fp16 the
# warps that widen them would spill in 24 registers.
FORWARD_WIDENED = {
    (64, 64): {"any": FwdConfig(tile_n=128, num_stages=3, spared_registers=8)},
    (96, 96): {"any": FwdConfig(tile_n=128, spared_registers=8)},
    (128, 128): {"any": FwdConfig(tile_n=128, spared_registers=8)},
    (192, 128): {"any": FwdConfig(tile_n=80, spared_registers=8)},
    (192, 192): {"any": FwdConfig(tile_n=64, spared_registers=8)},
    (256, 256): {"any": FwdConfig(tile_n=48, spared_registers=8)},
}

# Of the backward pass; figures of its loop without a mask.  Head dims between these take the wider
# row, whose columns beyond TMA fills with zeros.
BACKWARD = {
    (64, 64): BwdConfig(  # 599; dv_early spills
        tile_m=128, v_in_registers=True, delta_in_parts=True, dq_in_bulk=True
    ),
    (96, 96): BwdConfig(  # 658
        tile_m=64, dv_early=True, v_in_registers=True, delta_in_parts=True, dq_in_bulk=True
    ),
    (128, 128): BwdConfig(tile_m=64, dv_early=True, delta_in_parts=True, dq_in_bulk=True),  # 698
    (192, 128): BwdConfig(64, 96, splits_products=True, dq_in_bulk=True),  # 590
    (192, 192): BwdConfig(64, 96, splits_products=True, do_stages=1, dq_in_bulk=True),  # 641
    (256, 256): BwdConfig(  # 558; space for 3 of 8 parts of dQ
        *(64, 80),
        splits_products=True,
        do_stages=1,
        dq_in_bulk=True,
        dq_slices=2,
        dq_copies=8,
        dq_room=3,
    ),
}
# With softcap, where these do not do: 128 queries spill, and dS takes more of P than its 16 bits.
BACKWARD_SOFTCAP = {
    (64, 64): BwdConfig(tile_m=64, dv_early=True, delta_in_parts=True, dq_in_bulk=True),
    (192, 128): BwdConfig(tile_m=64, tile_n=64, dq_in_bulk=True),
    (192, 192): BwdConfig(tile_m=64, tile_n=64, dq_in_bulk=True),
    (256, 256): BwdConfig(tile_m=64, tile_n=64),  # no space for dQ
}

# Sequences with lengths and windows of their own, where V in registers spills.
BACKWARD_RAGGED_LOCAL = {(64, 64): replace(BACKWARD[64, 64], v_in_registers=False)}


# Of Ampere and Ada, as BACKWARD: the first config of a row that fits.  In the comment issue slots
# per exponential of the steady loop, by SASS; FlashAttention-2's C++ has 8.6, 10.4, 13.0, 17.3 and
# 21.3.  32 rows per warp halve what is read of K and V; of 192 and 256 O would take all registers.
FORWARD_SM80 = {
    (64, 64): (Sm80Config(tile_n=64, num_stages=2),),  # 7.7
    (96, 96): (
        Sm80Config(tile_n=64, num_stages=2),  # 8.9; 72 KiB
        Sm80Config(tile_n=64),  # 8.8
    ),
    (128, 128): (  # 48 keys spill
        Sm80Config(tile_n=32, num_stages=2),  # 11.3; 64 KiB
        Sm80Config(tile_n=32),  # 11.0
    ),
    (192, 128): (
        Sm80Config(tile_n=32),  # 12.6; 68 KiB
        Sm80Config(64, 8, rows_per_warp=16, ctas_per_sm=1, q_in_registers=192),
    ),
    (192, 192): (
        Sm80Config(64, 8, num_stages=2, ctas_per_sm=1, warps_per_row=2),  # 14.8; 161 KiB
        Sm80Config(64, 8, 16, ctas_per_sm=1, q_in_registers=192),
    ),
    (256, 256): (
        Sm80Config(64, 8, ctas_per_sm=1, warps_per_row=2),  # 17.2; 145 KiB
        Sm80Config(32, 8, 16, ctas_per_sm=1),  # 19.6
        Sm80Config(32, rows_per_warp=16, ctas_per_sm=1),  # beside a head dim of 96
    ),
}

# Of the backward pass, by rows of BACKWARD: the first one that fits.
BACKWARD_SM80 = {
    (64, 64): (
        Sm80BwdConfig(64, 128, k_in_registers=64, v_in_registers=64, score_slices=2),
    ),  # 82 KiB
    (96, 96): (
        Sm80BwdConfig(64, 128),  # 113 KiB
        Sm80BwdConfig(64, 128, num_stages=1),  # 89 KiB
    ),
    (128, 128): (
        Sm80BwdConfig(64, 128, score_slices=2),  # 145 KiB
        Sm80BwdConfig(32, 128, num_stages=1),  # 88 KiB
    ),
    (192, 128): (
        Sm80BwdConfig(64, 96, key_warps=2, num_stages=1),  # 124 KiB
        Sm80BwdConfig(
            64, 64, num_stages=1, k_in_registers=192, v_in_registers=128, v_is_kept=False
        ),  # 72 KiB
    ),
    (192, 192): (
        Sm80BwdConfig(64, 96, key_warps=2, num_stages=1),  # 144 KiB
        Sm80BwdConfig(
            64, 64, num_stages=1, k_in_registers=192, v_in_registers=192, v_is_kept=False
        ),  # 80 KiB
    ),
    (256, 256): (
        Sm80BwdConfig(64, 64, key_warps=2, num_stages=1),  # 144 KiB
        Sm80BwdConfig(32, 64, num_stages=1, v_in_registers=192, v_is_kept=False),  # 76 KiB
    ),
}
# With softcap, where these spill.
BACKWARD_SM80_SOFTCAP = {
    (64, 64): (Sm80BwdConfig(32, 128, k_in_registers=64, v_in_registers=64),),  # 58 KiB
    (96, 96): (
        Sm80BwdConfig(64, 128, score_slices=2),  # 113 KiB
        Sm80BwdConfig(64, 128, num_stages=1, score_slices=2),  # 89 KiB
    ),
    (128, 128): (
        Sm80BwdConfig(32, 128),  # 105 KiB
        BACKWARD_SM80[128, 128][1],
    ),
    (192, 192): (
        Sm80BwdConfig(64, 96, key_warps=2, num_stages=1, score_slices=2),  # 144 KiB
        BACKWARD_SM80[192, 192][1],
    ),
}


# A tile of so many rows holds all that a sequence of a cache has in a step of generation.
FEW_ROWS = 64
MOST_STAGES = 6


def forward(
    signature: Signature, capability: tuple[int, int] = (9, 0), rows: int | None = None
) -> FwdConfig | Sm80Config:
    """The config of the row for both head dims, else that of the larger one, which also fits.

    rows: at most so many of q has any sequence; None: not known.
    """
    if capability[0] != 9:
        return _forward_sm80(signature, capability)
    config = _forward_sm90(signature)
    is_few = signature.is_ragged and rows is not None and rows <= FEW_ROWS
    return for_few_rows(config, signature) if is_few and not signature.quantised else config


def for_few_rows(config: FwdConfig, signature: Signature) -> FwdConfig:
    """One consumer warpgroup, and the space that others had for stages: memory sets the pace.

    Blocks of keys are as they were, and so are the bits of the results.
    """
    if not signature.widens:  # beside one warpgroup those that load have enough registers
        config = replace(config, spared_registers=0)
    for num_stages in range(MOST_STAGES, config.num_stages - 1, -1):
        few = replace(config, num_mma_warpgroups=1, num_stages=num_stages)
        if few.smem_bytes(signature) <= SMEM_LIMIT:
            return few
    return replace(config, num_mma_warpgroups=1)


def _forward_sm90(signature: Signature) -> FwdConfig:
    table = FORWARD if signature.quantised is None else FORWARD_FP8
    table = FORWARD_WIDENED if signature.widens else table
    widest = max(signature.head_dim, signature.head_dim_v)
    row = table.get((signature.head_dim, signature.head_dim_v)) or table[widest, widest]
    # TMA brings pages in parts that divide a block: more keys at a time of 128 than of 176.
    config = row["any"] if signature.page_rows else row.get(signature.mask) or row["any"]
    config = row.get("split", config) if signature.is_split else config
    if signature.is_ragged:
        config = row.get(f"ragged {signature.mask}", config)
    if signature.gathers:
        config = row.get(f"gathered {signature.mask}") or row.get("gathered", config)
    v_block = 0 if signature.quantised is None else signature.quantised.v_block
    if v_block % config.tile_n:  # a tile would reach over two scales of v
        config = row.get("blocks", config)
    return config if v_block % config.tile_n == 0 else replace(config, tile_n=v_block)


def backward_tiles(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The tiles of the row that serves these tiles of head dims."""
    return min(row for row in BACKWARD if row[0] >= head_dim and row[1] >= head_dim_v)


def backward(signature: BwdSignature, capability: tuple[int, int] = (9, 0)) -> AnyBwdConfig:
    """The config of the row for both head dims."""
    tiles = signature.head_dim, signature.head_dim_v
    has_softcap = signature.score == "softcap"
    if capability[0] != 9:
        row = BACKWARD_SM80_SOFTCAP.get(tiles) if has_softcap else None
        return _first_that_fits(row or BACKWARD_SM80[tiles], signature, capability)
    is_ragged_local = signature.is_ragged and signature.mask == "local"
    others = BACKWARD_SOFTCAP if has_softcap else BACKWARD_RAGGED_LOCAL if is_ragged_local else {}
    return others.get(tiles) or BACKWARD[tiles]


def _forward_sm80(signature: Signature, capability: tuple[int, int]) -> Sm80Config:
    row = FORWARD_SM80[backward_tiles(signature.head_dim, signature.head_dim_v)]
    return _first_that_fits(row, signature, capability)


def _first_that_fits(row: tuple, signature, capability: tuple[int, int]):
    """The first config of the row that fits, else the last one."""
    smem = SMEM_OF_SM.get(capability, min(SMEM_OF_SM.values()))
    return next((config for config in row if config.fits(signature, smem)), row[-1])
