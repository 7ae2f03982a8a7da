"""Serialised matrix products, local memory, setmaxnreg."""

from fa3.inspect import hazards
from fa3.inspect.flow import Flow
from fa3.inspect.hazards import RegisterChange
from fa3.inspect.loops import main_loops

from .listings import ATTENTION, CHAIN, EXPONENTIALS, program

ALONE = """
    WARPGROUP.ARRIVE
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
"""
LOAD = """
    USETMAXREG.DEALLOC.CTAPOOL 0x18
    UTMALDG.4D [UR8], [UR6], desc[URZ]
    EXIT
"""


def warnings(text: str) -> tuple[str, ...]:
    flow = Flow(program(text))
    loops = main_loops(flow)
    return hazards.warnings(flow, loops[0] if loops else None, hazards.register_changes(flow))


def test_a_kernel_as_it_should_be_has_no_warnings():
    assert warnings(f"@P0 BRA ->consumer\n {LOAD}\n consumer:\n {ATTENTION}") == ()


def test_each_mma_with_a_full_wait_is_serialised():
    code = program(ALONE * 3).code
    assert hazards.serialised(code) == (16, 64, 112)


def test_a_chain_with_one_wait_is_not():
    code = program(f"{CHAIN}\n WARPGROUP.DEPBAR.LE gsb0, 0x0\n" * 3).code
    assert hazards.serialised(code) == ()


def test_two_chains_with_a_partial_wait_are_not():
    text = f"{CHAIN}{CHAIN} WARPGROUP.DEPBAR.LE gsb0, 0x1\n WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert hazards.serialised(program(text).code) == ()


def test_serialised_mmas_in_the_loop_are_named():
    text = f"""
        USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
        {ALONE}
        loop:
        {ALONE * 2}
        {EXPONENTIALS}
        @P0 BRA ->loop
        EXIT
    """
    (warning,) = warnings(text)
    assert warning.startswith("3 serialised warpgroup MMAs, 2 of them in the steady loop")
    assert warning.endswith("the first at 0x20")


def test_local_memory_is_counted_in_bytes_and_in_the_loop():
    spill = 'STL.64 [R1], R4 (*"SpillRefill"*)'
    text = ATTENTION.replace("VOTE.ANY P0, P1", f"VOTE.ANY P0, P1\n {spill}\n LDL R4, [R1]")
    text = text.replace("loop:", 'STL [R1+0x8], R4 (*"SpillRefill"*)\n loop:', 1)
    local = hazards.Local.of(program(text).code)
    assert local == hazards.Local(loads=1, stores=2, spill_load_bytes=0, spill_store_bytes=12)
    (warning,) = warnings(text)
    assert warning.startswith("local memory: 1 loads and 2 stores, 2 of them in the steady loop")


def test_register_changes_know_their_role():
    text = f"@P0 BRA ->consumer\n {LOAD}\n consumer:\n {ATTENTION}"
    assert hazards.register_changes(Flow(program(text))) == (
        RegisterChange(address=16, role="producer", grows=False, registers=24),
        RegisterChange(address=64, role="consumer", grows=True, registers=240),
    )


def test_a_role_without_its_setmaxnreg_is_named():
    bare = ATTENTION.replace("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "")
    (warning,) = warnings(f"@P0 BRA ->consumer\n {LOAD}\n consumer:\n {bare}")
    assert "consumer" in warning
    load = LOAD.replace("USETMAXREG.DEALLOC.CTAPOOL 0x18", "")
    (warning,) = warnings(f"@P0 BRA ->consumer\n {load}\n consumer:\n {ATTENTION}")
    assert "producer" in warning
