"""Blocks, dominators and natural loops."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fa3.inspect.flow import Flow

from .listings import program


def loops(text: str) -> list[tuple[int, list[int]]]:
    """(position of the header, positions in the body) of each loop."""
    flow = Flow(program(text))
    return [
        (
            flow.blocks[loop.header].first,
            sorted(i for block in loop.blocks for i in flow.blocks[block].positions),
        )
        for loop in flow.loops
    ]


def test_straight_code_is_one_block():
    flow = Flow(program("FADD R0, R1, R2\n FADD R0, R1, R2\n EXIT"))
    assert [(b.first, b.last, b.successors) for b in flow.blocks] == [(0, 2, ())]


def test_a_predicated_exit_and_branch_also_fall_through():
    flow = Flow(program("@P0 EXIT\n @P1 BRA ->end\n FADD R0, R1, R2\n end:\n EXIT"))
    assert [b.successors for b in flow.blocks] == [(1,), (3, 2), (3,), ()]


def test_a_branch_with_its_predicate_as_operand_is_conditional():
    flow = Flow(program("BRA.U UP0, ->end\n FADD R0, R1, R2\n end:\n EXIT"))
    assert flow.blocks[0].successors == (2, 1)


def test_an_indirect_branch_goes_to_all_its_targets():
    text = 'BRX R2 -0x10 (*"BRANCH_TARGETS .L_one,.L_two"*)\n one:\n EXIT\n two:\n EXIT'
    assert Flow(program(text)).blocks[0].successors == (1, 2)


def test_bsync_meets_where_bssy_said():
    text = "BSSY B0, ->meet\n @P0 BRA ->away\n BSYNC B0\n away:\n BSYNC B0\n meet:\n EXIT"
    flow = Flow(program(text))
    assert [block.successors for block in flow.blocks] == [(2, 1), (3,), (3,), ()]


def test_a_barrier_that_is_used_again_meets_where_it_was_set_last():
    pair = "BSSY B0, ->{0}\n @P0 BRA ->{0}\n FADD R0, R1, R2\n BSYNC B0\n {0}:\n FADD R0, R1, R2\n"
    flow = Flow(program(pair.format("first") + pair.format("second") + "EXIT"))
    assert [block.successors for block in flow.blocks] == [(2, 1), (2,), (4, 3), (4,), ()]


def test_nested_loops_are_two():
    text = """
        outer:
        FADD R0, R1, R2
        inner:
        FADD R0, R1, R2
        @P0 BRA ->inner
        @P1 BRA ->outer
        EXIT
    """
    assert loops(text) == [(0, [0, 1, 2, 3]), (1, [1, 2])]


def test_a_jump_back_from_out_of_line_code_makes_no_loop():
    text = """
        @P0 BRA ->far
        back:
        FADD R0, R1, R2
        EXIT
        far:
        FMUL R0, R1, R2
        BRA ->back
    """
    assert loops(text) == []


def test_out_of_line_code_belongs_to_its_loop():
    text = """
        loop:
        @P0 BRA ->far
        back:
        @P1 BRA ->loop
        EXIT
        far:
        FMUL R0, R1, R2
        BRA ->back
    """
    assert loops(text) == [(0, [0, 1, 3, 4])]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_dominators_are_blocks_without_which_there_is_no_way(targets):
    """Block i ends in a conditional branch to block targets[i]."""
    count = len(targets)
    lines = [f"b{i}:\n @P0 BRA ->b{t % count}" for i, t in enumerate(targets)]
    flow = Flow(program("\n".join([*lines, "end:\n EXIT"])))

    def reached(without: int | None) -> set[int]:
        seen, todo = set(), [0]
        while todo:
            block = todo.pop()
            if block != without and block not in seen:
                seen.add(block)
                todo += flow.blocks[block].successors
        return seen

    assert len(flow.blocks) == count + 1
    everything = reached(None)
    for a in everything:
        cut = everything - reached(a)
        assert {b for b in everything if flow.dominates(a, b)} == cut
