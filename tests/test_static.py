"""What can be said of the speed of every shipped kernel without a GPU: from its SASS."""

import functools

import pytest
import torch

import fa3
from fa3 import tuning
from fa3.inspect import cli
from fa3.inspect.model import predict
from fa3.kernels.config import SMEM_LIMIT
from fa3.kernels.signature import Signature

REGISTERS = 65_536  # per SM, and one CTA has all of them
VARIANTS = [
    Signature(dtype, *dims, mask)
    for dims in sorted(tuning.FORWARD)
    for dtype, mask in (("bf16", "full"), ("bf16", "causal"), ("bf16", "local"), ("fp16", "full"))
]

# head dim: at most so many issue slots per exponential in the steady loop's straight way (the C++
# FA3 has 7.18 at 128 and 5.86 at 64, the floor is about 4.5), at least so many predicted TFLOPs/s
# (the best FA4 and FA3 tiles: 518 at 64, 668 at 128, 721 at 256). bf16, without a mask.
GOALS = {64: (5.4, 535), 128: (5.6, 685), 256: (None, 755)}


@functools.cache
def inspected(signature: Signature) -> cli.Inspection:
    return cli.inspect(signature)


@pytest.fixture(params=VARIANTS, ids=lambda s: f"{s.dtype}-{s.head_dim}-{s.head_dim_v}-{s.mask}")
def inspection(request, device) -> cli.Inspection:
    """`device` installs the emulator first, so that the accuracy tests share what is compiled."""
    return inspected(request.param)


def test_no_spills_no_local_memory_no_serialised_mmas(inspection):
    report = inspection.report
    assert report.warnings == ()
    assert (report.resources.frame, report.local.loads, report.local.stores) == (0, 0, 0)
    assert report.serialised == ()


def test_each_product_stands_in_the_code_once(inspection):
    """The warps of a warpgroup may leave the steady loop at different steps, and must come back to
    the same wgmma instructions (docs/algorithm.md): the compiler may not copy the loop.
    """
    d, phases = inspection.signature.head_dim, {"full": 1, "causal": 2, "local": 3}
    scores, output = d // 16, inspection.config.tile_n // 16
    loops = phases[inspection.signature.mask] * (scores + output)
    assert inspection.report.mmas == scores + loops + output


def test_every_role_moves_its_registers_as_configured(inspection):
    config, changes = inspection.config, inspection.report.register_changes
    found = {(change.role, change.grows, change.registers) for change in changes}
    assert found == {
        ("producer", False, config.producer_registers),
        ("consumer", True, config.consumer_registers),
    }
    after = config.producer_registers + config.num_mma_warpgroups * config.consumer_registers
    assert 128 * after <= REGISTERS
    assert inspection.report.resources.threads == config.num_threads
    assert inspection.report.resources.registers * config.num_threads <= REGISTERS


def test_shared_memory_fits(inspection):
    static = inspection.report.resources.static_smem
    assert static + inspection.smem_bytes <= SMEM_LIMIT


@pytest.mark.parametrize("head_dims", sorted(tuning.FORWARD))
def test_a_launch_asks_for_no_more_shared_memory_than_the_config_says(head_dims, device):
    if device.type == "cuda":
        pytest.skip("a launch on a GPU does not report its shared memory, the emulator does")
    d, dv = head_dims
    q, v = torch.zeros(1, 8, 1, d), torch.zeros(1, 8, 1, dv)
    fa3.flash_attn_func(q.bfloat16(), q.bfloat16(), v.bfloat16())
    asked = fa3.emulator.launches[-1]["smem"]
    said = inspected(Signature("bf16", d, dv, "full")).smem_bytes
    assert said - 1024 <= asked <= said


def test_there_is_a_main_loop_for_blocks_without_a_mask(inspection):
    """With a mask there are more; the steady one must be free of what masking adds."""
    loops = inspection.report.loops
    assert loops
    steady = loops[0].straight
    assert steady.exponentials == inspection.config.tile_n // 2  # of a thread: 64 rows, 128 threads
    full = inspected(Signature(**vars(inspection.signature) | {"mask": "full"}))
    if inspection.config == full.config:
        assert steady.kinds["fp32"] == full.report.steady.straight.kinds["fp32"]


@pytest.mark.parametrize("head_dim", sorted(GOALS))
def test_the_steady_loop_reaches_its_goals(head_dim, device):
    slots, tflops = GOALS[head_dim]
    signature = Signature("bf16", head_dim, head_dim, "full")
    found = inspected(signature)
    if slots is not None:
        assert found.report.steady.straight.per_exponential <= slots
    assert predict(found.artifacts.cubin).tflops >= tflops
