"""Check "race": each kernel has one bug that it must find, and a twin without it that must pass.

A body holds the cure between {{ }}, which the broken kernel lacks, and a bug to add between [[ ]].
"""

import re

import numpy as np
import pytest
import torch

from fa3.emulator.errors import Race

from .ptx_runner import launch
from .test_checks import line_of

# %r1 own word in the buffer, %r2 that of the thread 32 further on, %p1 thread 0, %p2 warp 0;
# mbarriers at buffer + 2048 and + 2056 with a count of 1; 1024 bytes at %rd0.
SETUP = """
    shl.b32 %r1, %r0, 2;
    add.u32 %r2, %r1, 128;
    and.b32 %r2, %r2, 511;
    setp.eq.u32 %p1, %r0, 0;
    setp.lt.u32 %p2, %r0, 32;
    mov.u32 %r3, buffer;
    add.u32 %r4, %r3, 2048;
    add.u32 %r5, %r3, 2056;
    @%p1 mbarrier.init.shared.b64 [%r4], 1;
    @%p1 mbarrier.init.shared.b64 [%r5], 1;
    bar.sync 0;
"""
LOAD = """
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r4], 512;
    @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd0], 512, [%r4];
"""
WAIT_FOR_LOAD = """
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r4], 0;
    @!%p3 bra WAIT;
"""
STORE = """
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r3], 512;
    @%p1 cp.async.bulk.commit_group;
"""
# 64 x 8 x 16, both operands without swizzle, in the first 256 and 2048 bytes of the buffer
PRODUCT = """
    cvt.u64.u32 %rd1, %r3;
    shr.u64 %rd1, %rd1, 4;
    or.b64 %rd1, %rd1, 0x0000000800080000;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1,%f2,%f3,%f4}, %rd1, %rd1, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
"""
DRAIN = "@%p1 cp.async.bulk.wait_group.read 0;"
WRITE, READ = "st.shared.b32 [%r1], %r0;", "ld.shared.b32 %r9, [%r2];"
READ_OWN, WRITE_OTHER = "ld.shared.b32 %r9, [%r1];", "st.shared.b32 [%r2], %r0;"

# name: body, message
BUGS = {
    "write, read by another warp": (
        WRITE + "{{bar.sync 0;}}" + READ,
        r"warp \d reads .* unordered with the write by warp \d at PTX line \d+: st.shared",
    ),
    "read, then overwritten by another warp": (
        READ_OWN + "{{bar.sync 0;}}" + WRITE_OTHER,
        r"warp \d writes .* unordered with the read by warp \d at PTX line \d+: ld.shared",
    ),
    "written by two warps": (
        WRITE + "{{bar.sync 1, 128;}}" + WRITE_OTHER,
        "warp 0 writes .* unordered with the write by warp",
    ),
    "write, read by another lane": (
        WRITE + "xor.b32 %r6, %r1, 4; {{bar.warp.sync -1;}} ld.shared.b32 %r9, [%r6];",
        r"lane 0 of warp 0 reads .* 0x4 that lane 1 of it wrote at PTX line \d+: st.shared",
    ),
    "read, then overwritten by another lane": (
        "xor.b32 %r6, %r1, 4; ld.shared.b32 %r9, [%r6]; {{bar.warp.sync -1;}}" + WRITE,
        r"lane 0 of warp 0 writes .* 0x0 that lane 1 of it read at PTX line \d+: ld.shared",
    ),
    "read by all lanes, then overwritten by one": (
        "@%p2 ld.shared.b32 %r9, [buffer]; {{bar.warp.sync -1;}} @%p1 st.shared.b32 [buffer], %r0;",
        "lane 0 of warp 0 writes .* that several lanes of it read",
    ),
    "written by two lanes": (
        WRITE + "and.b32 %r6, %r1, -8; {{bar.warp.sync -1;}} st.shared.v2.b32 [%r6], {%r0, %r0};",
        r"lane 0 of warp 0 writes .* 0x4 that lane 1 of it wrote",
    ),
    "an mbarrier between lanes": (
        "st.shared.b32 [%r1], %r0; setp.eq.u32 %p4, %r0, 1; @!%p2 bra END; bar.warp.sync -1;"
        "@%p4 st.shared.b32 [buffer], %r0; {{@%p4 mbarrier.arrive.shared.b64 _, [%r4];}}"
        "@!%p1 bra END; [[mbarrier.arrive.shared.b64 _, [%r5];]] {{" + WAIT_FOR_LOAD + "}}"
        "ld.shared.b32 %r9, [buffer]; END:",
        r"lane 0 of warp 0 reads .* that lane 1 of it wrote",
    ),
    "a barrier between the wrong warps": (
        # threads 0..63 and 64..127 meet apart, so that warps 1 and 2 do not
        "shr.u32 %r6, %r0, 6; add.u32 %r6, %r6, 1;"
        + WRITE
        + "bar.sync %r6, 64; {{bar.sync 0;}}"
        + READ,
        r"unordered with the write by warp 2",
    ),
    "arrival before the write it announces": (
        "@!%p1 bra NEXT; {{st.shared.b32 [buffer], %r0;}} mbarrier.arrive.shared.b64 _, [%r4];"
        "[[st.shared.b32 [buffer], %r0;]] NEXT:" + WAIT_FOR_LOAD + "ld.shared.b32 %r9, [buffer];",
        r"warp 1 reads .* unordered with the write by warp 0 .*st.shared",
    ),
    "no wait for the arrival": (
        "@!%p1 bra NEXT; st.shared.b32 [buffer], %r0; mbarrier.arrive.shared.b64 _, [%r4]; NEXT:"
        "{{" + WAIT_FOR_LOAD + "}} ld.shared.b32 %r9, [buffer];",
        r"warp 1 reads .* unordered with the write by warp 0 .*st.shared",
    ),
    "load read before it has landed": (
        LOAD + "{{" + WAIT_FOR_LOAD + "}}" + READ_OWN,
        r"warp \d reads shared memory 0x0..0x7f unordered with the write by bulk load of warp 0 at "
        r"PTX line \d+: .*: no wait on its mbarrier",
    ),
    "load over what another warp still reads": (
        READ_OWN + "bar.warp.sync -1; {{bar.sync 0;}}" + LOAD,
        "bulk load of warp 0 writes .* unordered with the read by warp 1 .*ld.shared",
    ),
    "two loads to one place": (
        LOAD + "{{" + WAIT_FOR_LOAD + "}}" + LOAD.replace("[%r4]", "[%r5]"),
        "bulk load of warp 0 writes .* unordered with the write by bulk load of warp 0",
    ),
    "overwritten while a store reads": (
        STORE + "{{@%p1 cp.async.bulk.wait_group.read 0; bar.sync 0;}}" + WRITE,
        r"warp 0 writes shared memory 0x0..0x7f unordered with the read by bulk store .*: "
        "no cp.async.bulk.wait_group of its thread",
    ),
    "exit while a store reads": (
        STORE + "{{@%p1 cp.async.bulk.wait_group.read 0;}}",
        "thread 0 exits while its bulk store may still read shared memory",
    ),
    "only the storing warp has waited": (
        STORE + DRAIN + "bar.warp.sync -1; {{bar.sync 0;}}" + WRITE,
        r"warp 1 writes .* unordered with the read by bulk store of warp 0",
    ),
    "only the storing lane has waited": (
        STORE + DRAIN + "{{bar.warp.sync -1;}} @%p2 " + WRITE,
        r"warp 0 writes .* unordered with the read by bulk store of warp 0",
    ),
    "only the storing lane has waited, and another one says so": (
        STORE
        + DRAIN
        + "{{bar.warp.sync -1;}} setp.eq.u32 %p4, %r0, 1; @%p4 mbarrier.arrive.shared.b64 _, [%r4];"
        + "@%p2 bra END;"
        + WAIT_FOR_LOAD
        + WRITE
        + "END:",
        r"warp 1 writes .* unordered with the read by bulk store of warp 0",
    ),
    "one lane announces what the others wrote": (
        "@!%p2 bra NEXT; st.shared.b32 [%r1], %r0; {{bar.warp.sync -1;}}"
        "@%p1 mbarrier.arrive.shared.b64 _, [%r4]; bra END; NEXT:"
        + WAIT_FOR_LOAD
        + "ld.shared.b32 %r9, [buffer+4]; END:",
        "warp 1 reads .* unordered with the write by warp 0 .*st.shared",
    ),
    "one lane stores what the others wrote": (
        "@%p2 st.shared.b32 [%r1], %r0; fence.proxy.async.shared::cta; {{bar.warp.sync -1;}}"
        + STORE
        + DRAIN,
        "bulk store of warp 0 reads shared memory .* unordered with the write by warp 0",
    ),
    "wait at an mbarrier that may not be there yet": (
        "@%p1 mbarrier.init.shared.b64 [%r3+2064], 1;"
        "@%p1 mbarrier.arrive.shared.b64 _, [%r3+2064];"
        "{{bar.sync 0;}}" + WAIT_FOR_LOAD.replace("[%r4]", "[%r3+2064]"),
        "warp 1 uses the mbarrier .* unordered with the write by warp 0 .*mbarrier.init",
    ),
    "store of what another warp writes": (
        WRITE + "fence.proxy.async.shared::cta; bar.warp.sync -1; {{bar.sync 0;}}" + STORE + DRAIN,
        "bulk store of warp 0 reads shared memory 0x80.* unordered with the write by warp 1",
    ),
    "operand overwritten before wait_group": (
        PRODUCT + "{{wgmma.wait_group.sync.aligned 0; bar.sync 0;}}" + WRITE,
        r"warp 0 writes .* unordered with the read by wgmma of warps \[0, 1, 2, 3\] .*: "
        "no wgmma.wait_group of its warps",
    ),
    "operand refilled before wait_group": (
        PRODUCT + "{{wgmma.wait_group.sync.aligned 0; bar.sync 0;}}" + LOAD,
        r"bulk load of warp 0 writes .* unordered with the read by wgmma",
    ),
    "the warps of a product have not all waited for its operand": (
        LOAD + "{{@!%p2 bra WAIT;}} @!%p2 bra GO;" + WAIT_FOR_LOAD + "GO:" + PRODUCT,
        r"wgmma of warps \[0, 1, 2, 3\] reads .* unordered with the write by bulk load",
    ),
    "cp.async read by another warp": (
        "cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %rd1, %rd0; add.u32 %r6, %r3, %r1;"
        "cp.async.ca.shared.global [%r6], [%rd1], 4; {{cp.async.wait_all;}} bar.sync 0;" + READ,
        r"reads .* unordered with the write by cp.async of warp \d .*: no cp.async.wait_group",
    ),
    "one lane announces what the others copied": (
        "cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %rd1, %rd0; @!%p2 bra NEXT;"
        "cp.async.ca.shared.global [%r1], [%rd1], 4; cp.async.wait_all; {{bar.warp.sync -1;}}"
        "@%p1 mbarrier.arrive.shared.b64 _, [%r4]; bra END; NEXT:"
        + WAIT_FOR_LOAD
        + "ld.shared.b32 %r9, [buffer+4]; END:",
        "warp 1 reads .* unordered with the write by warp 0 .*cp.async.wait_all",
    ),
    "mbarrier used before all know that it is there": (
        "add.u32 %r6, %r3, 2064; @%p1 mbarrier.init.shared.b64 [%r6], 128; {{bar.sync 0;}}"
        "mbarrier.arrive.shared.b64 _, [%r6];",
        "warp 1 uses the mbarrier .* unordered with the write by warp 0 .*mbarrier.init",
    ),
}


def broken(body: str) -> str:
    return re.sub(r"\{\{.*?\}\}", "", body, flags=re.S).replace("[[", "").replace(";]]", ";")


def cured(body: str) -> str:
    return re.sub(r"\[\[.*?;\]\]", "", body, flags=re.S).replace("{{", "").replace("}}", "")


def run(body: str) -> None:
    launch(SETUP + body, np.zeros(1024, np.uint8), checks=("race",))


@pytest.mark.parametrize("name", BUGS)
def test_a_race_is_found(name):
    body, message = BUGS[name]
    with pytest.raises(Race, match=message):
        run(broken(body))


@pytest.mark.parametrize("name", BUGS)
def test_the_kernel_without_the_race_passes(name):
    run(cured(BUGS[name][0]))


def test_atomics_do_not_race_with_each_other():
    run("atom.shared.add.u32 %r9, [buffer], 1; red.shared.add.u32 [buffer], 1;")
    with pytest.raises(Race, match="reads .* unordered with the write by warp .*atom.shared"):
        run("atom.shared.add.u32 %r9, [buffer], 1; ld.shared.b32 %r9, [buffer];")


def test_it_names_the_lines_of_the_kernel(emulator, compiled):
    a = torch.arange(128, dtype=torch.int32)
    with emulator.options(checks=("race",)), pytest.raises(emulator.Race) as found:
        compiled("reverse", a, sync=-2)(a)
    assert line_of("_reverse", "s[t] = a[t]") in str(found.value)
    assert found.value.source.endswith(line_of("_reverse", "a[t] = s["))
    with emulator.options(checks=("race",)):
        compiled("reverse", a)(a)
