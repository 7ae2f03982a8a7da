"""Main loops and their instruction mix."""

from fa3.inspect.flow import Flow
from fa3.inspect.loops import main_loops
from fa3.inspect.mix import KINDS, Mix

from .listings import ATTENTION, CHAIN, EXPONENTIALS, program, repeat

RESCALE = repeat(32, "FMUL R{0}, R{0}, R202")
SCALE = repeat(32, "FFMA R{0}, R{0}, R200, R201")


def steady(text: str):
    return main_loops(Flow(program(text)))[0]


def test_every_kind_of_instruction_is_in_one_kind_only():
    bases = [base for names in KINDS.values() for base in names.split()]
    assert len(bases) == len(set(bases))


def test_the_mix_counts_slots_without_nops():
    mix = Mix.of(program("NOP\n FADD R0, R1, R2\n MUFU.EX2 R0, R1\n MUFU.RCP R0, R1").code)
    assert mix.slots == 3
    assert mix.exponentials == 1
    assert mix.kinds == {"mufu": 2, "nop": 1, "fp32": 1}
    assert mix.per_exponential == 3


def test_the_straight_way_leaves_the_rescaling_out_and_all_counts_it():
    loop = steady(ATTENTION)
    # 2 x (arrive, two MMAs, wait), 32 FFMA, vote, 32 MUFU, branch, 16 F2FP, branch
    assert loop.straight.slots == 8 + 32 + 1 + 32 + 1 + 16 + 1
    assert loop.straight.exponentials == 32
    assert loop.straight.mma_shapes == {"64x64x16": 4}
    assert loop.straight.kinds["nop"] == 1
    assert loop.all.slots == loop.straight.slots + 33
    assert loop.all.exponentials == 33
    (skipped,) = loop.skipped
    assert skipped.mix.kinds == {"fp32": 32, "mufu": 1}
    assert not skipped.out_of_line


def test_a_block_moved_out_of_line_is_counted_the_same():
    loop = steady(f"""
        loop:
        {CHAIN}
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        {EXPONENTIALS}
        @P0 BRA ->far
        back:
        @P2 BRA ->loop
        EXIT
        far:
        {RESCALE}
        BRA ->back
    """)
    assert loop.straight.slots == 4 + 32 + 2
    assert loop.all.slots == loop.straight.slots + 33
    assert [part.out_of_line for part in loop.skipped] == [True]


def test_spinning_on_a_wait_out_of_line_is_no_part_of_an_iteration():
    loop = steady(f"""
        loop:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2
        @!P0 BRA ->spin
        go:
        {CHAIN}
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        {EXPONENTIALS}
        @P2 BRA ->loop
        EXIT
        spin:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2
        @!P0 BRA ->spin
        BRA ->go
    """)
    assert loop.straight.slots == loop.all.slots == 2 + 4 + 32 + 1
    assert loop.skipped == ()


def test_a_skippable_block_with_many_exponentials_is_work():
    loop = steady(f"""
        loop:
        {CHAIN}
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        @P0 BRA ->calm
        {EXPONENTIALS}
        calm:
        @P2 BRA ->loop
        EXIT
    """)
    assert loop.straight.exponentials == 32
    assert loop.straight.slots == loop.all.slots


def test_of_two_sides_of_a_branch_the_shorter_is_straight():
    loop = steady(f"""
        loop:
        {CHAIN}
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        {EXPONENTIALS}
        @P0 BRA ->other
        {RESCALE}
        BRA ->join
        other:
        FADD R0, R1, R2
        join:
        @P2 BRA ->loop
        EXIT
    """)
    assert loop.straight.slots == 4 + 32 + 1 + 1 + 1
    assert loop.all.slots == loop.straight.slots + 33


def test_the_steady_loop_is_the_one_with_fewest_slots_per_exponential():
    text = f"""
        masked:
        {CHAIN}
        {SCALE}
        {repeat(32, "FSEL R{0}, R{0}, -INF, P1")}
        {EXPONENTIALS}
        @P2 BRA ->masked
        plain:
        {CHAIN}
        {SCALE}
        {EXPONENTIALS}
        @P2 BRA ->plain
        EXIT
    """
    found = main_loops(Flow(program(text)))
    assert [loop.straight.slots for loop in found] == [68, 100]
    assert found[0].head > found[1].latch


def test_an_outer_loop_is_no_main_loop():
    text = f"""
        tile:
        {CHAIN}
        loop:
        {CHAIN}
        {EXPONENTIALS}
        @P2 BRA ->loop
        {EXPONENTIALS}
        @P3 BRA ->tile
        EXIT
    """
    assert [loop.straight.slots for loop in main_loops(Flow(program(text)))] == [36]


def test_rare_code_around_the_loop_does_not_vanish():
    text = f"""
        tile:
        {CHAIN}
        resume:
        {RESCALE}
        loop:
        {CHAIN}
        {EXPONENTIALS}
        @P0 BRA ->resume
        @P2 BRA ->loop
        @P3 BRA ->tile
        EXIT
    """
    loop = steady(text)
    assert loop.straight.slots == loop.all.slots == 3 + 32 + 2
    assert loop.around.all.slots == 32 + 3 + 32 + 1
    assert loop.around.around is None


def test_a_loop_over_tiles_with_work_of_its_own_is_no_rare_code():
    text = f"tile:\n {CHAIN}\n loop:\n {CHAIN}\n {EXPONENTIALS}\n @P2 BRA ->loop\n @P3 BRA ->tile"
    assert steady(text).around is None


def test_a_kernel_without_exponentials_has_no_main_loop():
    assert main_loops(Flow(program(f"loop:\n {CHAIN}\n @P0 BRA ->loop\n EXIT"))) == ()
