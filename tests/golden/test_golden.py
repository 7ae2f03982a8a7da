"""Outputs that a Hopper GPU gave, committed here, beside those of this machine's kernels.

On a machine without a GPU those are the emulator's: this is where it meets the silicon. The files
are made by `python -m perf.device --steps outputs` (docs/device.md).
"""

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perf.device.exact import judged
from perf.device.outputs import Stored, keep, load, save
from perf.device.passes import PASSES
from perf.device.small import Small, decoded, digest

from ..accuracy import assert_lse, assert_same_nonfinite

HERE = Path(__file__).parent
NONE_YET = "no output of a GPU is committed under tests/golden yet (docs/device.md)"
ROWS = {row.name: row for row in PASSES}


def assert_close(name, actual, wanted):
    """Two roundings of an element, or of its row where that is larger; far less on average.

    The operations are the same and in the same order. What may differ are the last bits of exp2
    and of the sums inside an MMA, and what they tip over where P and O are rounded.
    """
    assert actual.shape == wanted.shape, f"{name}: shape {tuple(actual.shape)}"
    assert actual.dtype == wanted.dtype, f"{name}: dtype {actual.dtype}"
    assert_same_nonfinite(name, actual, wanted)
    rounding = torch.finfo(wanted.dtype).eps
    actual, wanted = actual.float().nan_to_num(), wanted.float().nan_to_num()
    size = torch.maximum(wanted.abs(), wanted.square().mean(-1, keepdim=True).sqrt())
    error = (actual - wanted).abs() / size.clamp_min(1e-20) / rounding
    worst, mean = error.max().item(), error.mean().item()
    assert worst <= 2, f"{name}: largest error {worst:.2f} roundings, allowed 2"
    assert mean <= 0.1, f"{name}: mean error {mean:.2f} roundings, allowed 0.1"


def compare(row, stored: Stored, device) -> None:
    case = stored.case
    assert digest(row.inputs(case)) == stored.inputs_digest, "not the inputs of the stored outputs"
    given = keep(row, case, stored.made, device).outputs
    assert given.keys() == stored.outputs.keys()
    for name, wanted in stored.outputs.items():
        rule = assert_lse if wanted.dtype == torch.float32 else assert_close
        rule(name, given[name], wanted)


def _committed():
    found = [(path.stem, stored) for path in sorted(HERE.glob("*.npz")) for stored in load(path)]
    if not found:
        return [pytest.param(None, None, marks=pytest.mark.skip(reason=NONE_YET), id="none")]
    return [pytest.param(name, stored, id=f"{name} {stored.case}") for name, stored in found]


@pytest.mark.parametrize(("name", "stored"), _committed())
def test_as_on_the_gpu(name, stored, device, emulated):
    compare(emulated(ROWS[name]), stored, device)


@pytest.mark.parametrize("name", ROWS)
def test_the_first_case_of_every_pass_is_right(name, device, emulated):
    """As on the GPU: the call, and its judgement."""
    row = emulated(ROWS[name])
    assert 0 < judged(row, row.smalls[0], device)[2] <= row.limits[row.smalls[0].dtype]


@pytest.fixture
def emulated(ampere):
    """A row of PASSES as it runs here: what it makes of a Hopper GPU, the emulator is."""

    def on_this_machine(row):
        if row.target.capability[0] != 8:
            return row
        ampere(row.target.capability)
        here = copy.copy(row)
        here.context = contextlib.nullcontext
        return here

    return on_this_machine


FP8 = Small("e4m3", 64, 64, 140, 150, h_q=2, h_k=2, seed=5, scales="block")
CASE = Small("bf16", 128, 128, 97, 130, causal=True, h_q=2, h_k=1, seed=3)


@pytest.fixture
def stored(device, tmp_path):
    """Of this machine itself, through a file."""
    path = tmp_path / "forward.npz"
    save(path, [keep(ROWS["forward"], CASE, {"device": "SYNTHETIC"}, device)])
    (only,) = load(path)
    return only


def test_a_file_gives_back_what_was_kept(stored, device):
    again = keep(ROWS["forward"], CASE, {"device": "SYNTHETIC"}, device)
    assert (stored.case, stored.inputs_digest, stored.made) == (
        CASE,
        again.inputs_digest,
        again.made,
    )
    assert all(torch.equal(stored.outputs[name], x) for name, x in again.outputs.items())
    compare(ROWS["forward"], stored, device)


def test_other_outputs_are_noticed(stored, device):
    out = stored.outputs["out"].clone()
    out[0, 5, 1, 7] *= 1.1
    wrong = replace(stored, outputs={**stored.outputs, "out": out})
    with pytest.raises(AssertionError, match="out: largest error"):
        compare(ROWS["forward"], wrong, device)
    everywhere = (stored.outputs["out"].float() * 1.01).bfloat16()
    wrong = replace(stored, outputs={**stored.outputs, "out": everywhere})
    with pytest.raises(AssertionError, match="out: mean error"):
        compare(ROWS["forward"], wrong, device)
    lse = stored.outputs["lse"] + 1e-3
    with pytest.raises(AssertionError, match="lse: largest error"):
        compare(ROWS["forward"], replace(stored, outputs={**stored.outputs, "lse": lse}), device)


def test_other_inputs_are_noticed(stored, device):
    other = replace(stored, case=replace(CASE, seed=4))
    with pytest.raises(AssertionError, match="not the inputs"):
        compare(ROWS["forward"], other, device)


def test_inputs_are_the_same_numbers_everywhere():
    """Of numpy's frozen stream; a change here would make every committed file useless."""
    assert digest(CASE.inputs()) == "00f51813722e2237"
    assert digest(FP8.inputs()) == "52c30597b67d1c8e"
    assert digest(replace(FP8, dtype="int8", scales="head").inputs()) == "141b253e29139b13"


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("dtype", ["e4m3", "int8"])
def test_codes_of_one_byte_stand_for_nearly_normal_numbers(dtype, scales):
    """Of a descale a little above 1 each; block 1 of the keys has another one than block 0."""
    case = replace(FP8, dtype=dtype, scales=scales)
    inputs = case.inputs()
    for x, codes in zip(decoded(*inputs), inputs, strict=False):
        assert 1 < x.std() < 2.2
        assert codes.float().abs().max() > 30
    k, (_, codes, _, _, descale, _) = decoded(*inputs)[1], inputs
    row = descale[0, 1] if scales == "head" else descale[0, 1, 140 // 128]
    assert torch.equal(k[0, 140, 1], codes[0, 140, 1].float() * row)


def test_small_cases_cover_every_kernel():
    for row in PASSES:
        kernels = {(s.head_dim, s.head_dim_v, s.mask) for s in row.signatures()}
        covered = {(c.head_dim, c.head_dim_v, c.mask) for c in row.smalls}
        assert covered >= kernels
        assert 3 <= len(row.smalls) <= 40
        assert len({case.seed for case in row.smalls}) == len(row.smalls)
