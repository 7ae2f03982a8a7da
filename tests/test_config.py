"""FwdConfig: what a CTA needs, and where O waits."""

import itertools
from dataclasses import replace

import pytest

from fa3.kernels.barriers import NamedBarriers
from fa3.kernels.config import SMEM_LIMIT, FwdConfig
from fa3.kernels.signature import HEAD_DIM_TILES, Signature, head_dim_tile
from fa3.launch import tuning

SIGNATURES = [
    Signature("bf16", d, dv, mask)
    for d, dv in itertools.product(HEAD_DIM_TILES, HEAD_DIM_TILES)
    for mask in ("full", "causal", "local")
]


@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
def test_every_signature_has_a_config_that_fits(signature):
    config = tuning.forward(signature)
    config.check(signature)
    assert config.smem_bytes(signature) <= SMEM_LIMIT
    assert config.tile_n % 16 == 0 and 16 <= config.tile_n <= 256  # wgmma's K and N
    assert config.tile_m == 64 * config.num_mma_warpgroups
    registers = config.producer_registers + config.num_mma_warpgroups * config.consumer_registers
    assert 128 * registers <= 65_536
    # S, P and O of a thread of a consumer warpgroup, with room for addresses and statistics
    tiles = config.tile_n // 2 + config.tile_n // 4 + signature.head_dim_v // 2
    assert tiles <= config.consumer_registers - 20


@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
def test_few_rows_have_one_warpgroup_and_the_space_of_others(signature):
    ragged = replace(signature, is_ragged=True)
    few, usual = (tuning.forward(ragged, rows=rows) for rows in (64, 65))
    assert usual == tuning.forward(ragged) == tuning.forward(ragged, rows=None)
    assert (few.num_mma_warpgroups, few.tile_n) == (1, usual.tile_n)
    assert few.num_stages >= usual.num_stages
    if few.num_stages < tuning.MOST_STAGES:
        more = replace(few, num_stages=few.num_stages + 1)
        assert more.smem_bytes(ragged) > SMEM_LIMIT
    few.check(ragged)
    few.check(ragged.split())
    assert tuning.forward(signature, rows=1) == tuning.forward(signature)


def test_space_of_o():
    narrow = Signature("bf16", 64, 64, "full")
    assert FwdConfig(tile_n=128, num_mma_warpgroups=3).space_of_o(narrow) == "own"
    square = Signature("bf16", 128, 128, "full")
    assert FwdConfig(tile_n=128).space_of_o(square) == "own"
    assert FwdConfig(tile_n=176).space_of_o(square) == "k"
    wide = Signature("bf16", 256, 256, "full")
    assert FwdConfig(tile_n=80).space_of_o(wide) == "kv"
    uneven = Signature("bf16", 192, 256, "full")
    assert FwdConfig(tile_n=80).space_of_o(uneven) == "q"


def test_smem_bytes_by_hand():
    """Q 128 x 128, two stages of K and V of 176 x 128, 16 bit, and the barriers."""
    signature = Signature("bf16", 128, 128, "full")
    assert FwdConfig(tile_n=176).smem_bytes(signature) == 2 * (16384 + 4 * 22528) + 1024


@pytest.mark.parametrize(
    "head_dim, tile", [(8, 64), (64, 64), (72, 96), (128, 128), (136, 192), (256, 256)]
)
def test_head_dim_tile(head_dim, tile):
    assert head_dim_tile(head_dim) == tile


def test_head_dim_beyond_the_widest_tile():
    with pytest.raises(ValueError, match="264.*256"):
        head_dim_tile(264)


@pytest.mark.parametrize(
    "wrong", [{"head_dim": 80}, {"head_dim_v": 40}, {"dtype": "fp32"}, {"mask": "alibi"}], ids=str
)
def test_signature_rejects_what_no_kernel_has(wrong):
    right = {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64, "mask": "full"}
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Signature(**(right | wrong))


@pytest.mark.parametrize("warpgroups", [1, 2, 3])
def test_named_barriers_are_apart(warpgroups):
    barriers = NamedBarriers(warpgroups)
    numbers = [
        number
        for i in range(warpgroups)
        for number in (
            barriers.turn(i),
            barriers.o_written(i),
            barriers.o_left(i),
            barriers.o_may_be_written(i, 0),
            barriers.o_may_be_written(i, 1),
        )
    ]
    assert sorted(numbers) == list(range(1, 5 * warpgroups + 1))
    assert barriers.o_may_be_written(0, 2) == barriers.o_may_be_written(0, 0)


def test_more_named_barriers_than_there_are():
    with pytest.raises(ValueError, match="4 warpgroups need 20 named barriers.* at most 15"):
        NamedBarriers(4)
