"""Which kernel and which config a case gets, and the error when there is none."""

import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fa3
from fa3 import ops
from fa3.kernels.bwd_config import BwdConfig
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.config import SMEM_LIMIT, FwdConfig
from fa3.kernels.signature import HEAD_DIM_TILES, Quantised, Signature
from fa3.kernels.sm80.config import SMEM_OF_SM
from fa3.launch import dispatch, jit, tuning

SIGNATURE = Signature("bf16", 128, 128, "causal")
FP8_SIGNATURE = Signature("e4m3", 128, 128, "causal", Quantised("e4m3", "e4m3", "bf16"))
ROOT = Path(__file__).parent.parent


def gpu(major, minor, name="some GPU"):
    return dispatch.Target("gpu", name, (major, minor), 132)


def test_hopper_gets_a_kernel():
    for signature, operands in ((SIGNATURE, "operands_16bit"), (FP8_SIGNATURE, "operands_fp8")):
        where = dispatch.forward(signature, gpu(9, 0)).where
        assert where == f"fa3.kernels.sm90.forward.{operands}:forward"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), *dispatch.NEWER])
def test_ampere_ada_and_newer_get_the_fallback(capability):
    target = gpu(*capability)
    assert dispatch.forward(SIGNATURE, target).where == "fa3.kernels.sm80.forward.kernel:forward"
    signature = BwdSignature("bf16", 128, 128, "causal", is_ragged=True, score="softcap")
    where = dispatch.backward(signature, target).where
    assert where == "fa3.kernels.sm80.backward.kernel:BackwardSm80"
    smem = SMEM_OF_SM[capability]
    tuning.forward(SIGNATURE, capability).check(SIGNATURE, smem)
    tuning.backward(signature, capability).check(signature, smem)


@pytest.mark.parametrize("capability", dispatch.NEWER)
def test_newer_gpus_have_what_ampere_lacks_refused_with_a_remedy(capability):
    with pytest.raises(NotImplementedError) as caught:
        dispatch.forward(FP8_SIGNATURE, gpu(*capability, name="NVIDIA Example"))
    assert "NVIDIA Example has no kernel for FP8: give q, k and v in bf16 or" in str(caught.value)


@pytest.mark.parametrize("signature", [SIGNATURE, FP8_SIGNATURE], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("capability", [(7, 5), (10, 9), (13, 0)])
def test_other_gpus_get_every_reason(capability, signature):
    with pytest.raises(NotImplementedError) as caught:
        dispatch.forward(signature, gpu(*capability, name="NVIDIA Example"))
    message = str(caught.value)
    for kernel in dispatch.FORWARD:
        assert kernel.name in message
    assert "NVIDIA Example has {}.{}".format(*capability) in message
    assert "9.x" in message and "8.x or one of 10.0, 10.3, 11.0, 12.0, 12.1" in message
    assert str(signature) in message


def test_a_call_on_another_gpu(monkeypatch):
    """The public function ends in that error, before anything is compiled."""
    monkeypatch.setattr(dispatch, "target_of", lambda device: gpu(7, 5, "NVIDIA T4"))
    monkeypatch.setattr(jit, "compile", lambda *_: pytest.fail("it compiled a kernel"))
    x = torch.ones(1, 2, 1, 72).half()
    ops.plan_of.cache_clear()
    with pytest.raises(NotImplementedError, match="NVIDIA T4 has 7.5"):
        fa3.flash_attn_func(x, x, x)


def test_no_kernel_for_a_case_lists_all(monkeypatch):
    """With several kernels in the table, each gives its own reason."""
    table = [
        dispatch.Kernel("first", "a:A", lambda s, t: f"it has no head dim {s.head_dim}"),
        dispatch.Kernel("second", "b:B", lambda s, t: f"it has no mask {s.mask}"),
    ]
    monkeypatch.setattr(dispatch, "FORWARD", table)
    with pytest.raises(NotImplementedError) as caught:
        dispatch.forward(SIGNATURE, gpu(9, 0))
    assert "first: it has no head dim 128" in str(caught.value)
    assert "second: it has no mask causal" in str(caught.value)
    serves = dispatch.Kernel("third", "c:C", lambda s, t: None)
    monkeypatch.setattr(dispatch, "FORWARD", [*table, serves])
    assert dispatch.forward(SIGNATURE, gpu(9, 0)) is serves


def _first_call(fa3_cpu):
    code = (
        "import sys, torch, fa3; x = torch.ones(1, 3, 2, 8).half();"
        "out, lse = fa3.flash_attn_func(x, x, x, causal=True, return_attn_probs=True);"
        "print(torch.equal(out, x), lse[0, 0].exp().tolist(), 'cutlass' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FA3_CPU"}
    if fa3_cpu is not None:
        environment["FA3_CPU"] = fa3_cpu
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("fa3_cpu", [None, "reference"])
def test_reference_needs_no_dsl(fa3_cpu):
    """Equal keys: the output is the value, and row i divides by i + 1 times exp(sqrt(8))."""
    done = _first_call(fa3_cpu)
    assert done.returncode == 0, done.stderr
    right, sums, dsl = re.fullmatch(r"(\w+) \[(.+)\] (\w+)\n", done.stdout).groups()
    assert (right, dsl) == ("True", "False")
    wanted = [(i + 1) * math.exp(math.sqrt(8)) for i in range(3)]
    assert [float(x) for x in sums.split(",")] == pytest.approx(wanted, rel=1e-5)


def test_unknown_fa3_cpu():
    done = _first_call("magic")
    assert done.returncode != 0
    assert "FA3_CPU is 'magic', expected 'reference' or 'emulate'" in done.stderr


@pytest.mark.parametrize(
    ("fa3_arch", "capability", "given", "compiled"),
    [
        (None, (9, 0), (9, 0), "sm_90a"),
        ("sm_80", (9, 0), (8, 0), "sm_90a"),  # the fallback, in the GPU's own code
        ("sm_89", (9, 0), (8, 9), "sm_90a"),
        (None, (8, 6), (8, 6), "sm_86"),
        (None, (12, 0), (12, 0), "sm_120"),
        ("sm_80", (12, 0), (12, 0), "sm_120"),
        ("sm_90a", (8, 0), (8, 0), "sm_80"),  # a GPU does not become another
    ],
)
def test_target_of_a_gpu(fa3_arch, capability, given, compiled):
    properties = SimpleNamespace(
        name="GPU", multi_processor_count=108, major=capability[0], minor=capability[1]
    )
    target = dispatch._gpu(properties, fa3_arch)
    assert (target.capability, target.arch, target.num_sms) == (given, compiled, 108)
    assert target.name == ("GPU" if given == capability else f"GPU as {fa3_arch}")


def test_unknown_fa3_arch(monkeypatch):
    monkeypatch.setenv("FA3_ARCH", "sm_75")
    with pytest.raises(ValueError, match="FA3_ARCH is 'sm_75', expected one of sm_80, .*sm_90a"):
        dispatch.target_of.__wrapped__(torch.device("cpu"))


def test_target_of_a_cpu_tensor(device):
    target = dispatch.target_of(device)
    assert target.kind == ("gpu" if device.type == "cuda" else "emulator")
    assert target.capability[0] == 9
    assert target.num_sms > 0
    if device.type == "cuda":
        assert target.name == torch.cuda.get_device_name(device)


DIMS_AND_MASKS = list(
    itertools.product(HEAD_DIM_TILES, HEAD_DIM_TILES, ("full", "causal", "local"))
)
SIXTEEN_BIT = [Signature(dtype, *row) for dtype in ("bf16", "fp16") for row in DIMS_AND_MASKS]
ONE_BYTE = [
    Signature("e4m3", *row, Quantised("e4m3", "e4m3", "bf16", *blocks))
    for row in DIMS_AND_MASKS
    for blocks in itertools.product((0, 64, 128), repeat=2)
]


def test_every_signature_has_a_config_that_fits():
    for signature in SIXTEEN_BIT + ONE_BYTE:
        config = tuning.forward(signature)
        assert isinstance(config, FwdConfig)
        assert config.smem_bytes(signature) <= SMEM_LIMIT, (signature, config)
        assert config.tile_n % 16 == 0


def test_no_tile_of_one_byte_inputs_reaches_over_two_scales():
    for signature in ONE_BYTE:
        tile_n = tuning.forward(signature).tile_n
        assert tile_n % 32 == 0  # keys of an instruction
        assert signature.quantised.v_block % tile_n == 0


@pytest.mark.parametrize(
    ("table", "signatures"), [(tuning.FORWARD, SIXTEEN_BIT), (tuning.FORWARD_FP8, ONE_BYTE)]
)
def test_every_row_of_the_table_is_used(table, signatures):
    others = [signature.split() for signature in signatures]
    for page_rows in (0, 1):
        others += [replace(x, is_ragged=True, page_rows=page_rows) for x in signatures]
    used = [tuning.forward(signature) for signature in signatures + others]
    for row in table.values():
        for config in row.values():
            assert any(config is other for other in used), config


def test_every_backward_signature_has_a_config_that_fits():
    used = set()
    for dtype, (d, dv, mask) in itertools.product(("bf16", "fp16"), DIMS_AND_MASKS):
        tiles = tuning.backward_tiles(d, dv)
        assert tiles[0] >= d and tiles[1] >= dv
        signature = BwdSignature(dtype, *tiles, mask)
        tuning.backward(signature).check(signature)
        used.add(tiles)
        kernel = dispatch.backward(signature, gpu(9, 0))
        assert kernel.where == "fa3.kernels.sm90.backward.kernel:BackwardSm90"
    assert used == set(tuning.BACKWARD)


def test_backward_on_other_gpus():
    signature = BwdSignature("bf16", 64, 64, "full")
    kernel = dispatch.backward(signature, gpu(8, 6))
    assert kernel.where == "fa3.kernels.sm80.backward.kernel:BackwardSm80"
    with pytest.raises(NotImplementedError, match="backward sm90: it needs .* 9.x, .* has 7.5"):
        dispatch.backward(signature, gpu(7, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_m": 96}, "tile_m is 96, expected 64 or 128"),
        ({"tile_n": 96}, "tile_n is 96, expected 64 or 128"),
        ({"tile_m": 128}, "tile_m is 128, expected less: accumulators are 256 registers, of 208"),
        ({"tile_n": 64, "dv_early": True}, "dv_early is True, expected False"),
        ({"num_stages": 1}, "num_stages is 1, expected at least 2"),
        ({"num_stages": 5}, "needs 265728 bytes of shared memory per CTA"),
        ({"num_mma_warpgroups": 3}, "num_mma_warpgroups is 3, expected 2"),
        ({"splits_products": True, "tile_n": 112}, "tile_n is 112, expected 64, 80, 96 or 128"),
        ({"do_stages": 1}, "do_stages is 1, expected that of num_stages without splits_products"),
        ({"tile_n": 64, "v_in_registers": True}, "v_in_registers is True, expected False where"),
        ({"tile_n": 64, "delta_in_parts": True}, "delta_in_parts is True, expected False where"),
        ({"dq_slices": 3}, "dq_slices is 3, expected parts of 16 columns of dQ"),
        ({"dq_slices": 2}, "dq_copies is 1, expected a multiple of dq_slices"),
        ({"dq_copies": 2, "dq_room": 3}, "dq_room is 3, expected from 1 to dq_copies"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_backward_configs_that_cannot_be(changes, message):
    config = BwdConfig(**{"tile_m": 64, **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        config.check(BwdSignature("bf16", 128, 128, "full"))


@pytest.mark.parametrize(
    "signature",
    [
        BwdSignature("bf16", 96, 96, "full"),
        BwdSignature("bf16", 128, 128, "full", score="softcap"),
    ],
    ids=["96 columns", "softcap"],
)
def test_products_that_warpgroups_cannot_split(signature):
    config = BwdConfig(64, 96, splits_products=True)
    with pytest.raises(ValueError, match="splits_products is True, expected True for 2 warp"):
        config.check(signature)
