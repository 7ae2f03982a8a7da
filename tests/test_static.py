"""What can be said of the speed of every shipped kernel without a GPU: from its SASS."""

import functools
from dataclasses import replace

import pytest
import torch

import fa3
from fa3.inspect import cli
from fa3.kernels.config import SMEM_LIMIT
from fa3.kernels.signature import Signature
from fa3.launch import tuning
from perf import static, variants
from perf.variants import QUANTISED, Variant, as_code, name_of, of_caches

REGISTERS = 65_536  # per SM, and one CTA has all of them
VARIANTS = variants.compared() + variants.with_scores()

# head dim: at most so many issue slots per exponential in the steady loop's straight way (the C++
# FA3 has 7.18 at 128 and 5.86 at 64, the floor is about 4.5), at least so many predicted TFLOPs/s
# (the best FA4 and FA3 tiles: 518 at 64, 668 at 128, 721 at 256). bf16, without a mask.
GOALS = {64: (5.4, 535), 128: (5.6, 685), 256: (None, 755)}
# The same of e4m3 with scales per block, at most so many slots (the C++ FA3 has 8.13 at 128).
GOALS_FP8 = {64: 6.5, 96: 6.5, 128: 6.5}


@functools.cache
def inspected(signature: Signature) -> cli.Inspection:
    return cli.inspect(signature)


@pytest.fixture(params=VARIANTS, ids=name_of, scope="module")
def inspection(request, device) -> cli.Inspection:
    """A variant at a time: disassembling takes longest, and each worker keeps what it read.

    `device` installs the emulator first, so that the accuracy tests share what is compiled.
    """
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
    signature, config = inspection.signature, inspection.config
    phases = {"full": 1, "causal": 2, "local": 3}
    contracted = 16 if signature.quantised is None else 32  # by one instruction
    slices = signature.head_dim_v // config.o_slice if config.o_slice else 1
    scores, output = signature.head_dim // contracted, config.tile_n // contracted * slices
    loops = phases[signature.mask] * (scores + output)
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
    of_scores = 2 if inspection.signature.score == "softcap" else 1
    scores = inspection.config.tile_n // 2  # of a thread: 64 rows, 128 threads
    assert steady.exponentials == of_scores * scores
    full = replace(inspection.signature, mask="full")
    if full in VARIANTS and inspection.config == tuning.forward(full):
        assert steady.kinds["fp32"] == inspected(full).report.steady.straight.kinds["fp32"]


@pytest.mark.parametrize("head_dim", sorted(GOALS))
def test_the_steady_loop_reaches_its_goals(head_dim, device):
    slots, tflops = GOALS[head_dim]
    signature = Signature("bf16", head_dim, head_dim, "full")
    found = inspected(signature)
    if slots is not None:
        assert found.report.steady.straight.per_exponential <= slots
    assert found.prediction.tflops >= tflops


@pytest.mark.parametrize("head_dim", sorted(GOALS_FP8))
def test_the_steady_loop_of_one_byte_inputs_reaches_its_goals(head_dim, device):
    signature = Signature("e4m3", head_dim, head_dim, "full", QUANTISED["block scales"])
    steady = inspected(signature).report.steady
    assert steady.straight.per_exponential <= GOALS_FP8[head_dim]


def test_no_kernel_is_worse_than_its_committed_line(inspection):
    committed = static.read()[name_of(inspection.signature)]
    assert static.worse(committed, static.Line.of(inspection)) == []


@pytest.mark.parametrize("signature", of_caches(), ids=name_of)
def test_kernels_of_caches_spill_nothing_and_are_no_worse(signature, device):
    found = inspected(signature)
    assert found.report.warnings == () and found.report.serialised == ()
    assert found.report.resources.frame == 0
    assert static.worse(static.read()[name_of(signature)], static.Line.of(found)) == []


@pytest.mark.parametrize(
    "table",
    [tuning.FORWARD, tuning.FORWARD_FP8, tuning.FORWARD_WIDENED],
    ids=["16 bits", "8 bits", "16 and 8 bits"],
)
def test_every_row_is_looked_at(table):
    looked_at = {tuning.forward(s) for s in VARIANTS + of_caches()}
    assert {config for row in table.values() for config in row.values()} <= looked_at


def test_the_committed_lines_are_those_of_the_shipped_kernels():
    lines = static.read()
    assert list(lines) == [variant.name for variant in static.kernels()]
    for variant in static.kernels():
        config = cli.shipped_config(variant.signature, variant.target)
        assert lines[variant.name].config == as_code(config)


LINE = static.Line("FwdConfig(tile_n=128)", 168, 0, 200_000, 5.2, 8.2)


@pytest.mark.parametrize(
    ("change", "losses"),
    [
        ({}, []),
        ({"slots_per_exp": 5.1, "registers": 160}, []),
        ({"slots_per_exp": 5.205}, []),
        ({"slots_per_exp": 5.25}, ["slots_per_exp: 5.25, committed 5.2"]),
        ({"local_bytes": 8}, ["local_bytes: 8, committed 0"]),
        ({"smem_bytes": 200_016}, ["smem_bytes: 200016, committed 200000"]),
        ({"config": "FwdConfig(tile_n=64)", "slots_per_exp": 9.0},
         ["config: FwdConfig(tile_n=64), committed FwdConfig(tile_n=128)"]),
    ],
)  # fmt: skip
def test_what_became_worse_is_named(change, losses):
    assert static.worse(LINE, replace(LINE, **change)) == losses


def test_the_table_is_written_and_checked(tmp_path, monkeypatch, capsys):
    path, (signature, other, *_) = tmp_path / "static.json", VARIANTS
    found = [LINE, replace(LINE, slots_per_exp=6.0)]
    monkeypatch.setattr(static, "kernels", lambda: [Variant(signature)])
    monkeypatch.setattr(static, "inspect", lambda signature, target: None)
    monkeypatch.setattr(static.Line, "of", lambda inspection: found[0])
    assert static.main([], path) == 0
    assert static.read(path) == {name_of(signature): LINE}
    assert static.main(["--check"], path) == 0
    monkeypatch.setattr(static, "kernels", lambda: [Variant(signature), Variant(other)])
    assert static.main([other.mask], path) == 0  # the two differ in their masks
    assert static.read(path) == {name_of(signature): LINE, name_of(other): LINE}
    found.pop(0)
    capsys.readouterr()
    assert static.main(["--check"], path) == 1
    losses = [f"{name_of(x)}: slots_per_exp: 6.0, committed 5.2" for x in (signature, other)]
    assert capsys.readouterr().out.splitlines() == losses
    assert set(static.read(path).values()) == {LINE}
