"""The timing model on loops written by hand."""

import functools
import re

import pytest

from fa3.inspect import cli
from fa3.inspect.flow import Flow
from fa3.inspect.loops import loops_beside, main_loops
from fa3.inspect.model import whatif
from fa3.inspect.model.calibrate import Case, evaluate
from fa3.inspect.model.cli import machine
from fa3.inspect.model.machine import Machine
from fa3.inspect.model.ops import decode, decode_all
from fa3.inspect.model.predict import all_begin, bound, tflops
from fa3.inspect.model.producer import Beside, loaded_per_step, transpose, v_bytes
from fa3.inspect.model.simulate import kv_bytes, simulate
from fa3.inspect.model.trace import TAKEN, trace
from fa3.inspect.model.traffic import Sums, Traffic, bytes_loaded
from fa3.inspect.sass import Control, Instruction
from fa3.kernels.signature import Signature

from .listings import program, repeat
from .model_programs import (
    BACKWARD,
    COPIES,
    FP8,
    LOADS,
    PINGPONG,
    REDS,
    SCORES,
    TRANSPOSE,
    WIDEN,
)

CALM = Machine(steal=0.0, slow=0.0)


def pingpong(warps: int, rescale_always: bool = False) -> list:
    code = program(PINGPONG)
    (loop,) = main_loops(Flow(code))
    return [trace(code, loop, w, rescale_always) for w in range(warps)]


def straight(text: str, **control) -> list[Instruction]:
    """The instructions of `text`, each with these control fields."""
    fields = {"stall": 1} | control
    code = program(text).code
    return [Instruction(x.address, "", x.opcode, x.operands, Control(**fields)) for x in code]


# Cycles per iteration as the prototype that was calibrated gives them, for (warpgroups, what-if),
# with the rescaling in every iteration.
CALIBRATED = {
    (1, "none"): 652.8,
    (2, "none"): 1089.0,
    (2, "drop"): 1025.0,
    (2, "no barriers"): 985.3,
    (2, "emulate"): 1105.6,
    (3, "none"): 1509.972783200076,
}
EDITS = {
    "none": lambda steps: steps,
    "drop": whatif.drop_rescale,
    "no barriers": whatif.no_barriers,
    "emulate": functools.partial(whatif.emulate_ex2, fraction=0.25),
}


@pytest.mark.parametrize(("warps", "edit"), CALIBRATED)
def test_cycles_are_those_of_the_calibrated_model(warps, edit):
    traces = [EDITS[edit](steps) for steps in pingpong(warps, rescale_always=True)]
    result = simulate(traces, Machine(), 24)
    assert result.cycles == pytest.approx(CALIBRATED[warps, edit], rel=1e-9)
    assert result.flops == warps * 8 * 2 * 64 * 64 * 16


def test_a_wait_for_keys_is_made_by_the_first_warpgroup_only():
    first, second = pingpong(2)
    waits = [sum("TRYWAIT" in x.opcode for x in steps) for steps in (first, second)]
    assert waits == [2, 1]


def test_a_guarded_rescaling_is_jumped_over_unless_asked_for():
    (calm,), (busy,) = pingpong(1), pingpong(1, rescale_always=True)
    assert sum(x.base == "FMUL" for x in calm) == 0
    assert sum(x.base == "FMUL" for x in busy) == 32
    assert sum(x.opcode == TAKEN for x in calm) == sum(x.opcode == TAKEN for x in busy) + 1


def test_a_guarded_block_with_a_named_barrier_is_executed():
    code = program(PINGPONG.replace("calm:", "BAR.ARV R7, 0x100\n calm:"))
    (loop,) = main_loops(Flow(code))
    assert sum(x.base == "FMUL" for x in trace(code, loop, 0)) == 32


def test_a_loop_that_goes_on_out_of_line_is_refused():
    text = PINGPONG.replace("calm:", "calm:\n BRA ->far\n back:") + "far:\n NOP\n BRA ->back"
    code = program(text)
    (loop,) = main_loops(Flow(code))
    with pytest.raises(ValueError, match="goes on out of line"):
        trace(code, loop, 0)


def test_back_to_back_matrix_products_run_at_the_peak():
    # 2 * 64 * 64 * 16 FLOP a quarter of which fall to an SMSP of 1024 FLOP a cycle
    mmas = straight(SCORES)
    result = simulate([mmas], Machine(), 40)
    assert result.cycles == pytest.approx(4 * 32, rel=1e-3)
    assert result.busy["tensor"] == pytest.approx(1, rel=1e-3)
    assert bound(result.busy).startswith("tensor core (0%")


def test_a_matrix_product_is_never_faster_than_its_operands_from_shared_memory():
    both = decode(program("HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24").code[0], Machine())
    registers = decode(program("HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR8], R24").code[0], CALM)
    assert both.busy == (64 * 16 + 8 * 16) * 2 / 128
    assert registers.busy == 2 * 64 * 8 * 16 / 4 / 1024
    assert both.smem == 1


def test_8_bit_matrix_products_are_twice_as_fast():
    half = decode(program("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24").code[0], Machine())
    quarter = decode(program("QGMMA.64x128x32.F32.E4M3 R24, gdesc[UR8], R24").code[0], Machine())
    assert quarter.busy == half.busy
    assert quarter.flops == 2 * half.flops


def test_columns_of_ones_take_time_and_are_no_attention():
    text = "QGMMA.64x{}x32.F32.E4M3.E4M3 R88, R56, gdesc[UR8], R88"
    plain, summing = (decode(program(text.format(n)).code[0], CALM) for n in (128, 136))
    assert summing.flops == plain.flops
    assert summing.busy == plain.busy * 136 / 128
    steps = straight(text.format(136))
    assert kv_bytes(steps) == v_bytes(steps) == 128 * 32


def test_exponentials_take_the_pipe_for_8_cycles():
    steps = straight(repeat(16, "MUFU.EX2 R{0}, R{0}"), stall=8)
    assert simulate([steps], Machine(), 40).cycles == pytest.approx(16 * 8, rel=1e-2)
    steps = straight(repeat(16, "MUFU.EX2 R{0}, R{0}"), stall=9)
    result = simulate([steps] * 3, Machine(), 40)
    assert result.cycles == pytest.approx(3 * 16 * 8, rel=1e-2)
    assert bound(result.busy) == "MUFU"


def test_a_warp_that_is_never_chosen_is_an_error():
    steps = straight(repeat(16, "MUFU.EX2 R{0}, R{0}"))
    with pytest.raises(RuntimeError, match="starves another"):
        simulate([steps] * 2, Machine(), 24)


def test_a_stall_count_delays_the_next_issue():
    steps = straight(repeat(16, "FADD R{0}, R{0}, R{0}"), stall=5)
    assert simulate([steps], Machine(), 40).cycles == pytest.approx(16 * 5, rel=1e-2)


def test_a_scoreboard_holds_the_next_instruction():
    load, use = program("LDS R0, [R1]\n FADD R2, R0, R0").code
    steps = [
        Instruction(0, "", load.opcode, load.operands, Control(stall=1, write_barrier=2)),
        Instruction(16, "", use.opcode, use.operands, Control(stall=1, wait=0b100)),
    ]
    assert simulate([steps], Machine(), 40).cycles == pytest.approx(Machine().lat_lds + 1, rel=1e-2)


def test_reading_registers_costs_a_running_matrix_product_time():
    adds = straight(repeat(64, "FADD R{0}, R{0}, R200"), stall=2)
    alone = simulate([straight(SCORES), adds], CALM, 40)
    contended = simulate([straight(SCORES), adds], Machine(slow=0.0), 40)
    assert alone.busy["stolen"] == 0
    assert contended.busy["stolen"] > 0.1
    assert contended.cycles > alone.cycles


def test_the_reuse_cache_saves_a_read():
    first, second = straight("FFMA R0, R1, R2.reuse, R3\n FFMA R4, R5, R2, R6")
    assert [op.reads for op in decode_all([first, second], Machine(), 2)] == [3, 2]


def test_a_turn_waits_for_the_warpgroup_before():
    result = simulate(pingpong(2), Machine(), 24)
    assert result.stalls["barrier"] > 0.01
    without = [whatif.no_barriers(steps) for steps in pingpong(2)]
    assert "barrier" not in simulate(without, Machine(), 24).stalls


@pytest.mark.parametrize(
    ("ahead", "wanted"),
    [
        ("", False),
        ("BAR.ARV R6, 0x100", True),
        ("BAR.ARV R6, 0x80", False),  # of one warpgroup alone
        ("@P6 BRA ->on\n BAR.ARV R6, 0x100\n on:", False),  # a ping-pong's first turn
    ],
)
def test_turns_of_which_every_warpgroup_has_one_ahead(ahead, wanted):
    code = program(f"{ahead}\n{PINGPONG}")
    flow = Flow(code)
    (loop,) = main_loops(flow)
    assert all_begin(flow, loop) == wanted


def test_where_all_may_begin_a_warpgroup_needs_the_turn_before():
    """Each needs what the other one did a step before, and both may be in a turn at once."""
    turn = f"BAR.SYNC.DEFER_BLOCKING R5, 0x100\n{repeat(100, 'NOP')}\nBAR.ARV R6, 0x100"
    steps = straight(turn, stall=4)
    ring, free = (simulate([steps, steps], Machine(), 24, all_begin=x) for x in (False, True))
    assert ring.cycles > 2 * 400 and 400 < free.cycles < 500
    (barrier,) = straight("BAR.SYNC.DEFER_BLOCKING R5, 0x80")
    assert decode(barrier, Machine()).kind == "control"


def test_a_copy_that_adds_is_not_jumped_over():
    """Of a block around it that is no elected lane's."""
    copy = "@P5 BRA ->dropped\n UBLKRED.G.S.ADD.F32.RN [UR26], [UR30], UR28\n dropped:"
    (steps,) = backward(copy)
    assert [x.base for x in steps].count("UBLKRED") == 1
    (without,) = backward(
        copy.replace("UBLKRED.G.S.ADD.F32.RN [UR26], [UR30], UR28", "IADD3 R4, R4, R5, RZ")
    )
    assert len(without) < len(steps)


def test_warps_that_wait_for_each_other_forever_are_a_deadlock():
    turn = "BAR.SYNC.DEFER_BLOCKING R5, 0x100\n BAR.SYNC.DEFER_BLOCKING R6, 0x100\n"
    steps = straight(f"{turn} BAR.ARV R6, 0x100")
    with pytest.raises(RuntimeError, match="deadlock"):
        simulate([steps, steps], Machine(), 24)


def test_l2_bandwidth_is_a_floor():
    (steps,) = pingpong(1)
    assert kv_bytes(steps) == 8 * 64 * 16 * 2
    result = simulate([steps], Machine(l2_bytes=2.0), 24)
    assert result.cycles == pytest.approx(kv_bytes(steps) / 2, rel=1e-2)


def fp8(warps: int) -> list:
    code = program(FP8)
    (loop,) = main_loops(Flow(code))
    return [trace(code, loop, w) for w in range(warps)]


def test_the_transpose_of_v_is_found_in_the_producer():
    found = transpose(program(TRANSPOSE + FP8))
    opcodes = [x.base for x in found.steps]
    assert found.bytes == 2 * 512
    assert opcodes.count("SYNCS") == 1 and "UTMALDG" not in opcodes
    assert opcodes.count("PRMT") == 8 and opcodes[-1] == "BRA"
    assert transpose(program(FP8)) is None


def test_the_widening_of_k_and_v_is_found_in_the_producer():
    found = transpose(program(WIDEN + FP8))
    assert found.widens and found.bytes == 2 * 512 and found.what == "widening of K and V"
    assert [x.base for x in found.steps].count("F2FP") == 8
    assert not transpose(program(TRANSPOSE + FP8)).widens


def test_each_warp_transposes_its_share_of_v():
    found = transpose(program(TRANSPOSE + FP8))
    (steps,) = fp8(1)
    assert v_bytes(steps) == 128 * 128
    per_kib = len(found.steps)
    assert len(found.share(128 * 128, 4)) == 4 * per_kib
    assert len(found.share(128 * 128, 8)) == 2 * per_kib
    half = found.share(512, 1)
    assert half == found.steps[: round(per_kib / 2)]


def test_shared_memory_of_a_step():
    """Head dim 128, 128 x 128: Q is read by every product, K and V by each warpgroup."""
    found = transpose(program(TRANSPOSE + FP8))
    traffics = [
        Traffic.of(fp8(2), Beside(found.share(128 * 128, warps), warps), Machine())
        for warps in (4, 2)
    ]
    assert traffics[0] == traffics[1]
    traffic = traffics[0]
    assert traffic.a == 2 * 64 * 128 / 128
    assert traffic.b == 2 * 2 * 128 * 128 / 128
    assert traffic.tma == 2 * 128 * 128 / 128
    assert traffic.transpose == 2 * 128 * 128 / 128
    assert traffic.other == 0
    assert traffic.total == 1152
    assert str(traffic) == "A 128, B 512, TMA 256, transpose of V 256"


def backward(add_dq: str) -> list:
    code = program(BACKWARD.replace("ADD_DQ", add_dq))
    (loop,) = main_loops(Flow(code))
    return [trace(code, loop, 0)]


@pytest.mark.parametrize("has_bulk", [False, True])
def test_shared_memory_and_sums_of_a_step_back(has_bulk):
    """64 x 64 at head dim 64; Q and dO arrive with 256 bytes of numbers each."""
    traces = backward("NOP" if has_bulk else REDS)
    sums = Sums.of(traces, has_bulk)
    dq = 64 * 64 * 4
    assert sums == (Sums(0, dq) if has_bulk else Sums(dq, 0))
    loaded = bytes_loaded(traces, loaded_per_step(program(LOADS)), sums)
    assert loaded == 2 * (64 * 64 * 2 + 256)
    traffic = Traffic.of(traces, None, Machine(), sums, loaded)
    assert traffic.a == 3 * 64 * 64 * 2 / 128  # K and V of S and dP, dS; P and dS are in registers
    assert traffic.b == 5 * 64 * 64 * 2 / 128
    assert (traffic.tma, traffic.sums) == (loaded / 128, sums.bulk / 128)


def test_loads_of_several_ways_through_a_loop_are_not_believed():
    traces = backward(REDS)
    assert bytes_loaded(traces, 100_000, Sums.of(traces, False)) == 64 * 64 * 4
    assert loaded_per_step(program(BACKWARD)) is None
    assert bytes_loaded(traces, None, Sums.of(traces, False)) == 64 * 64 * 4


def test_sums_in_l2_hold_a_warp_up_when_too_many_wait():
    traces = backward(REDS)
    fast, slow, full = (simulate(traces, Machine(l2_sums=x), 24) for x in (1e6, 30.0, 4.0))
    assert fast.busy["sums"] < 0.01 and "sums in L2" not in fast.stalls
    assert slow.stalls["sums in L2"] > 0.1 and slow.cycles > fast.cycles + 100
    assert full.cycles == pytest.approx(64 * 64 * 4 / 4.0, rel=0.01)
    patient = simulate(traces, Machine(l2_sums=30.0, sums_queue=8), 24)
    assert patient.cycles < fast.cycles + 10


@pytest.mark.parametrize("keep", [0, 1])
def test_a_copy_that_adds_holds_the_warp_up_that_needs_its_room(keep):
    """L2 takes 16 KiB at a time, of all four sub-partitions."""
    traces = backward(COPIES.replace("KEEP", str(keep)))
    assert [x.base for x in traces[0]].count("UBLKRED") == 2  # one lane does it, the warp goes too
    fast, slow = (simulate(traces, Machine(l2_sums=x), 24) for x in (1e6, 60.0))
    copy = 4 * 4096 / 60.0
    assert slow.busy["sums"] == pytest.approx(2 * copy / slow.cycles, rel=0.05)
    if keep:
        assert slow.cycles < fast.cycles + 10
    else:
        assert slow.cycles > fast.cycles + copy / 2 and slow.stalls["sums in L2"] > 0.1


def test_warpgroups_that_split_the_products_have_a_loop_each():
    """One makes the exponentials, the other none: both are predicted, and count as slots."""
    beside = BACKWARD.replace("loop", "beside").replace("MUFU.EX2", "FADD").replace("EXIT", "")
    code = program(beside.replace("ADD_DQ", "NOP") + BACKWARD.replace("ADD_DQ", "NOP"))
    flow = Flow(code)
    (loop,), (other,) = main_loops(flow), loops_beside(flow)
    assert loop.straight.slots == other.straight.slots
    assert (loop.straight.exponentials, other.straight.exponentials) == (32, 0)


def test_a_transpose_that_is_no_bottleneck_only_contends():
    traces = fp8(2)
    found = transpose(program(TRANSPOSE + FP8))
    share = found.share(128 * 128, 4)
    alone, beside = (simulate(traces, CALM, 24, p) for p in (None, Beside(share, 4)))
    assert beside.flops == alone.flops
    assert alone.cycles < beside.cycles < alone.cycles + 2 * len(share) + 256
    assert beside.busy["stolen"] > 0 == alone.busy["stolen"]
    assert beside.busy["issue"] > alone.busy["issue"]


def test_a_slow_transpose_holds_the_consumers_up():
    traces, steps = fp8(2), straight(repeat(900, "FADD R{0}, R{0}, R{0}"), stall=4)
    result = simulate(traces, CALM, 24, Beside(steps, 4))
    assert result.cycles == pytest.approx(3600, rel=0.01)
    assert simulate(traces, CALM, 24, Beside(steps, 4, ahead=1)).cycles > 3600 + 1000


def test_an_emulated_exponential_takes_nine_instructions():
    (steps,) = pingpong(1)
    edited = whatif.emulate_ex2(steps, 0.25)
    assert sum(x.is_exp2 for x in edited) == 24
    assert len(edited) == len(steps) + 8 * 8
    assert edited[-1] == steps[-1]
    assert sum(x.control.stall for x in edited) >= sum(x.control.stall for x in steps)


def test_machine_constants_can_be_set_and_are_checked():
    assert machine(["steal=0.5", "xu=4"]) == Machine(steal=0.5, xu=4)
    with pytest.raises(ValueError, match="no 'stael'"):
        machine(["stael=0.5"])


def test_calibration_finds_the_constants_that_made_the_figures():
    true = Machine(steal=0.5, slow=0.4)
    cases = []
    for warps in (1, 2):
        traces = pingpong(warps, rescale_always=True)
        measured = tflops(simulate(traces, true, 24), 1.6, 0.97)
        cases.append(Case(f"{warps} warpgroups", traces, 0.97, measured, True))
    right, wrong = evaluate(cases, 0.5, 0.4), evaluate(cases, 1.0, 0.4)
    assert right.error == pytest.approx(0, abs=1e-9)
    assert right.clock == pytest.approx(1.6)
    assert wrong.error > 1e-3


def test_the_command_predicts_a_shipped_kernel(device, tmp_path, capsys):
    inspection = cli.inspect(Signature("bf16", 64, 64, "full"))
    path = cli.dump(inspection, tmp_path)[1]
    assert cli.main(["predict", str(path), "--iterations", "8", "--timeline"]) == 0
    steady = capsys.readouterr().out
    assert cli.main(["predict", str(path), "--iterations", "8", "--rescale-always"]) == 0
    always = capsys.readouterr().out
    rates = [int(re.search(r"predicted (\d+) TFLOPs", out)[1]) for out in (steady, always)]
    assert 989 > rates[0] > rates[1] > 100  # 989 is the dense peak
    assert "on the straight way" in steady
    assert "with every skippable block" in always
    assert steady.count(" MMA  |") == inspection.config.num_mma_warpgroups


def test_the_command_bounds_a_kernel_of_ampere(device, tmp_path, capsys):
    signature = Signature("bf16", 64, 64, "causal")
    path = cli.dump(cli.inspect(signature, target=cli.TARGETS["sm_80"]), tmp_path)[1]
    assert cli.main(["predict", str(path)]) == 0
    out = capsys.readouterr().out
    assert "TFLOPs/s of an A100" in out and "floors" in out


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "no.cubin"
    assert cli.main(["predict", str(path)]) == 1
    assert str(path) in capsys.readouterr().err
    path.write_bytes(b"something else")
    assert cli.main(["predict", str(path)]) == 1
    assert "not a cubin" in capsys.readouterr().err
