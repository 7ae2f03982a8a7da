"""Parsing: operands, declarations, scopes, source lines."""

import pytest

from fa3.emulator.errors import Unsupported
from fa3.emulator.ptx import Location, parse
from fa3.emulator.ptx.operands import parse_operand, split

MODULE = """.version 9.0
.target sm_90a
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry first(
    .param .u8 a,
    .param .u64 .ptr .global .align 16 b,
    .param .align 64 .b8 map[128]
)
.reqntid 384, 1, 1
{
    .reg .pred %p<3>;
    .reg .b32 %r<4>, %q;
    .shared .align 8 .b8 bars[24];
    .loc 1 10 5
    mov.b32 %r1, 7; // a comment; with { punctuation
    @!%p1 bra $L_end;
    /* a longer
       comment */
    ld.global.v2.b32 {%r2, %r3}, [%rd1+-8];
    // begin inline asm
    {
    .reg .pred P1;
    .loc 1 12 5
    LAB: mbarrier.try_wait.parity.shared::cta.b64 P1, [%r1+16], 0;
    @P1 bra LAB;
    }
    // end inline asm
    .loc 2 99 0
$L_end:
    ret;
}
.file 1 "/somewhere/kernel.py"
.file 2 "/somewhere/other.py"
"""


@pytest.fixture(scope="module")
def kernel():
    return parse(MODULE).kernels["first"]


def test_parameters_are_packed_by_alignment(kernel):
    assert [(p.name, p.offset, p.size) for p in kernel.params] == [
        ("a", 0, 1),
        ("b", 8, 8),
        ("map", 64, 128),
    ]
    assert kernel.param_bytes == 192
    assert kernel.directives["reqntid"] == [384, 1, 1]


def test_dynamic_shared_memory_follows_static(kernel):
    assert kernel.shared == {"bars": (0, 24), "dynamic": (1024, 0)}
    assert kernel.static_smem == 1024


def test_registers_get_rows_by_class(kernel):
    assert kernel.regs["%r3"] == ("w", 3) and kernel.regs["%q"] == ("w", 4)
    assert kernel.counts == {"p": 4, "w": 5}  # with P1


def test_braces_scope_registers_and_labels(kernel):
    wait = next(i for i in kernel.code if i.parts[0] == "mbarrier")
    assert wait.args[0] == ("reg", "P1@1")
    back = kernel.code[kernel.code.index(wait) + 1]
    assert kernel.labels[back.args[0][1]] == kernel.code.index(wait)


def test_instruction_fields(kernel):
    branch, load = kernel.code[1:3]
    assert (branch.pred, branch.neg, branch.op) == ("%p1", True, "bra")
    assert load.args == [("vec", [("reg", "%r2"), ("reg", "%r3")]), ("mem", ("reg", "%rd1"), -8)]
    assert MODULE.splitlines()[load.line - 1].strip() == load.text + ";"


def test_source_lines_skip_lines_of_inline_asm(kernel):
    move, wait, ret = kernel.code[0], kernel.code[3], kernel.code[-1]
    assert move.loc == wait.loc == Location("/somewhere/kernel.py", 10)
    assert str(ret.loc) == "/somewhere/other.py:99"


@pytest.mark.parametrize(
    "text, operand",
    [
        ("0f3F800000", ("f32", 0x3F800000)),
        ("0d3FF0000000000000", ("f64", 0x3FF0000000000000)),
        ("-12", ("imm", -12)),
        ("0x1fU", ("imm", 31)),
        ("017", ("imm", 15)),
        ("0", ("imm", 0)),
        ("1.5", ("f32", 0x3FC00000)),
        ("_", ("sink",)),
        ("!%p1", ("not", ("reg", "%p1"))),
        ("%r1|%p1", ("pair", ("reg", "%r1"), ("reg", "%p1"))),
        ("[buffer+16]", ("mem", ("reg", "buffer"), 16)),
        ("[%rd1, {%r1, 2}]", ("map", ("reg", "%rd1"), [("reg", "%r1"), ("imm", 2)])),
    ],
)
def test_operands(text, operand):
    assert parse_operand(text, lambda name: name) == operand


def test_split_ignores_commas_inside_brackets():
    assert split("{a, b}, [c, {d, e}], f") == ["{a, b}", "[c, {d, e}]", "f"]


@pytest.mark.parametrize("line", [".reg .b128 %x;", ".const .b8 stack[16];"])
def test_unknown_declarations_are_refused(line):
    with pytest.raises(Unsupported, match="PTX line"):
        parse(MODULE.replace(".reg .pred %p<3>;", line))
