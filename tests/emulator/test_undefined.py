"""Check "uninit" on registers: uses of values that a thread never wrote, and copies of them.

As in test_races.py, a body holds the cure between {{ }} and a bug to add between [[ ]].
"""

import numpy as np
import pytest

from fa3.emulator.errors import Uninitialized
from fa3.emulator.ptx import parse
from fa3.emulator.ptx.dataflow import Undefined

from .ptx_runner import HEADER, launch
from .test_bugs import DONE, FENCE, OPERANDS, REGISTERS
from .test_races import broken, cured

FIRST = "setp.lt.u32 %p1, %r0, 7;"
# scale-d is %p4: false for the first product
LOOP = """
    mov.b32 %r30, 0;
NEXT:
    setp.ne.b32 %p4, %r30, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f5,%f6,%f7,%f8},
        %rd1, %rd1, %p4, 1, 1, 0, 0;
    add.u32 %r30, %r30, 1;
    setp.lt.u32 %p4, %r30, 3;
    @%p4 bra NEXT;
"""

# name: body, message
BUGS = {
    "computed with": (
        "{{mov.b32 %r1, 5;}} add.u32 %r2, %r1, 1;",
        r"128 threads from 0 on use register %r1, .* \(nothing writes it\)",
    ),
    "written after its use": (
        "{{mov.b32 %r1, 5;}} add.u32 %r2, %r1, 1; mov.b32 %r1, 5;",
        "128 threads from 0 on use register %r1",
    ),
    "written by some lanes": (
        FIRST + "{{mov.b32 %r1, 4;}} @%p1 mov.b32 %r1, 5; add.u32 %r2, %r1, 1;",
        "121 threads from 7 on use register %r1, .*it is written at .*@%p1 mov",
    ),
    "written on one of two paths": (
        FIRST + "@%p1 bra ELSE; mov.b32 %r1, 5; ELSE: {{@%p1 mov.b32 %r1, 4;}}"
        "add.u32 %r2, %r1, 1;",
        "7 threads from 0 on use register %r1",
    ),
    "first round of a loop": (
        "mov.b32 %r3, 0; {{mov.b32 %r1, 0;}} AGAIN: add.u32 %r2, %r1, 1; mov.b32 %r1, %r2;"
        "add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 3; @%p2 bra AGAIN;",
        "128 threads from 0 on use register %r1",
    ),
    "an address": (
        "{{mov.b64 %rd1, %rd0;}} ld.global.b32 %r1, [%rd1];",
        "use register %rd1,",
    ),
    "what is stored": (
        "{{mov.b32 %r1, 5;}} st.shared.b32 [buffer], %r1;",
        "use register %r1,",
    ),
    "a predicate that branches": (
        "{{setp.eq.u32 %p1, %r0, 0;}} @%p1 bra END; mov.b32 %r1, 1; END:",
        "use register %p1,",
    ),
    "a predicate that guards": (
        "{{setp.eq.u32 %p1, %r0, 0;}} @%p1 mov.b32 %r1, 1;",
        "use register %p1,",
    ),
    "a predicate that selects": (
        "{{setp.eq.u32 %p1, %r0, 0;}} selp.b32 %r1, 1, 2, %p1;",
        "use register %p1,",
    ),
    "a copy of a copy": (
        "{{mov.b32 %r1, 5;}} mov.b32 %r2, %r1; mov.b32 %r3, %r2; add.u32 %r4, %r3, 1;",
        "use register %r3,",
    ),
    "a selected value": (
        FIRST + "{{mov.b32 %r1, 5;}} selp.b32 %r2, %r1, 3, %p1; add.u32 %r4, %r2, 1;",
        "7 threads from 0 on use register %r2",
    ),
    "a half": (
        "mov.b16 %rs1, 5; {{mov.b16 %rs2, 5;}} mov.b32 %r1, {%rs1, %rs2}; [[add.u32 %r2, %r1, 1;]]"
        "mov.b32 {%rs3, %rs4}, %r1; [[cvt.u32.u16 %r3, %rs4;]] cvt.u32.u16 %r3, %rs3;",
        "use register %r1,",
    ),
    "the other half": (
        "mov.b16 %rs1, 5; mov.b32 %r1, {%rs1, %rs2}; prmt.b32 %r1, %r1, 0, 0x1054;"
        "mov.b32 {%rs3, %rs4}, %r1; cvt.u32.u16 %r3, %rs4; [[cvt.u32.u16 %r3, %rs2;]]",
        "use register %rs2,",
    ),
    "part of a pair": (
        "mov.b32 %r1, 5; {{mov.b32 %r2, 6;}} mov.b64 %rd1, {%r1, %r2}; add.s64 %rd2, %rd1, 1;",
        "use register %rd1,",
    ),
    "an operand of a product": (
        OPERANDS.replace("mov.b32 %r22, 0;", "{{mov.b32 %r22, 0;}}") + FENCE + REGISTERS + DONE,
        "use register %r22,",
    ),
    "an accumulator": (
        OPERANDS + FENCE + "[[mov.b32 %r30, 1; bra NEXT;]]" + LOOP + DONE,
        r"128 threads from 0 on use register %f5 \(and 3 more\)",
    ),
}  # fmt: skip


ZEROS = "mov.u32 %r3, buffer; shl.b32 %r41, %r0, 4; st.shared.v4.b32 [%r41], {0, 0, 0, 0};"


def run(body: str) -> None:
    if "wgmma" in body:
        body = ZEROS + body
    launch(body, np.zeros(1024, np.uint8), checks=("uninit",))


@pytest.mark.parametrize("name", BUGS)
def test_a_use_of_an_unwritten_register_is_found(name):
    body, message = BUGS[name]
    with pytest.raises(Uninitialized, match=message):
        run(broken(body))


@pytest.mark.parametrize("name", BUGS)
def test_the_kernel_that_writes_it_passes(name):
    run(cured(BUGS[name][0]))


def test_nothing_is_watched_where_every_path_writes_first():
    body = "@%p1 bra ELSE; mov.b32 %r1, 1; bra END; ELSE: mov.b32 %r1, 2; END: add.u32 %r2, %r1, 1;"
    kernel = parse(HEADER + "setp.eq.u32 %p1, %r0, 3;" + body + "\nret;\n}\n").kernels["k"]
    assert not Undefined(kernel).watched
