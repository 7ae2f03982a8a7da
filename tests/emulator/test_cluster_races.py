"""Checks "race" and "global" together: races on global memory between the warps of one cluster.

As in test_races.py, a body holds the cure between {{ }} and a bug to add between [[ ]].
"""

import numpy as np
import pytest

from fa3.emulator.errors import Race

from .ptx_runner import launch
from .test_races import DRAIN, LOAD, SETUP, STORE, WAIT_FOR_LOAD, broken, cured

# %rd1 own word in global memory, %rd2 that of the thread 32 further on
PLACES = """
    cvt.u64.u32 %rd1, %r1; add.s64 %rd1, %rd1, %rd0;
    cvt.u64.u32 %rd2, %r2; add.s64 %rd2, %rd2, %rd0;
"""
WRITE, READ = "st.global.b32 [%rd1], %r0;", "ld.global.b32 %r9, [%rd2];"
READ_OWN, WRITE_OTHER = "ld.global.b32 %r9, [%rd1];", "st.global.b32 [%rd2], %r0;"
FILL = "st.shared.b32 [%r1], %r0; fence.proxy.async.shared::cta; bar.sync 0;"
RANK = "mov.u32 %r7, %cluster_ctarank; setp.eq.u32 %p4, %r7, 0;"
MEET = "{{barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;}}"
# name: body, message
BUGS = {
    "write, read by another warp": (
        WRITE + "{{bar.sync 0;}}" + READ,
        r"warp 0 reads global memory 0x\w+..0x\w+ \(from byte 128 of the tensor on\) unordered "
        r"with the write by warp 1 at PTX line \d+: st.global.*: no barrier leads from there",
    ),
    "read, then overwritten by another warp": (
        READ_OWN + "{{bar.sync 0;}}" + WRITE_OTHER,
        r"warp 0 writes global memory .* unordered with the read by warp 1 .*ld.global",
    ),
    "written by two warps": (
        WRITE + "{{bar.sync 1, 128;}}" + WRITE_OTHER,
        "warp 0 writes global memory .* unordered with the write by warp 1",
    ),
    "halves of a word, and all of it": (
        "shr.u32 %r6, %r0, 5; shl.b32 %r6, %r6, 1; cvt.u64.u32 %rd3, %r6; add.s64 %rd3, %rd3, %rd0;"
        "setp.lt.u32 %p3, %r0, 64; cvt.u16.u32 %rs1, %r0; @%p3 st.global.b16 [%rd3], %rs1;"
        "[[@%p1 ld.global.b32 %r9, [%rd0];]]",
        r"warp 0 reads global memory .*\(from byte 2 of the tensor on\) .* write by warp 1",
    ),
    "a flag that is not looked at": (
        "@!%p1 bra NEXT; st.global.b32 [%rd0], %r0; red.release.gpu.global.add.u32 [%rd0+600], 1;"
        "NEXT: {{WAIT: ld.acquire.gpu.global.b32 %r9, [%rd0+600]; setp.eq.u32 %p3, %r9, 0;"
        "@%p3 bra WAIT;}} ld.global.b32 %r9, [%rd0];",
        "warp 1 reads global memory .* unordered with the write by warp 0",
    ),
    "written after the flag": (
        "@!%p1 bra NEXT; {{st.global.b32 [%rd0], %r0;}}"
        "red.release.gpu.global.add.u32 [%rd0+600], 1; [[st.global.b32 [%rd0], %r0;]]"
        "NEXT: WAIT: ld.acquire.gpu.global.b32 %r9, [%rd0+600]; setp.eq.u32 %p3, %r9, 0;"
        "@%p3 bra WAIT; ld.global.b32 %r9, [%rd0];",
        "warp 1 reads global memory .* unordered with the write by warp 0",
    ),
    "read before a bulk store is over": (
        FILL + STORE + "{{" + DRAIN + "bar.sync 0;}}" + READ + DRAIN,
        "warp 0 reads global memory .* unordered with the write by bulk store of warp 0 .*: no "
        "cp.async.bulk.wait_group of its thread",
    ),
    "bulk load of what another warp writes": (
        WRITE + "bar.warp.sync -1; {{bar.sync 0;}}" + LOAD + WAIT_FOR_LOAD,
        "bulk load of warp 0 reads global memory .* unordered with the write by warp 1",
    ),
    "written while a bulk load reads": (
        LOAD + "{{" + WAIT_FOR_LOAD + "}}" + WRITE,
        "warp 0 writes global memory .* unordered with the read by bulk load of warp 0",
    ),
    "cp.async of what another warp writes": (
        WRITE + "{{bar.sync 0;}} cp.async.ca.shared.global [%r1], [%rd2], 4; cp.async.wait_all;",
        "cp.async of warp 0 reads global memory .* unordered with the write by warp 1",
    ),
    "two CTAs of a cluster": (
        RANK + "@%p4 st.global.b32 [%rd1], %r0;" + MEET + "@!%p4 ld.global.b32 %r9, [%rd1];",
        "warp 0 of CTA 1 of the cluster reads global memory .* the write by warp 0 of CTA 0",
    ),
}


def run(body: str) -> None:
    size = 2 if "cluster_ctarank" in body else 1
    checks = "race", "global"
    memory = np.zeros(1024, np.uint8)
    launch(SETUP + PLACES + body, memory, grid=size, cluster=size, checks=checks, limit=300_000)


@pytest.mark.parametrize("name", BUGS)
def test_a_race_is_found(name):
    body, message = BUGS[name]
    with pytest.raises(Race, match=message):
        run(broken(body))


@pytest.mark.parametrize("name", BUGS)
def test_the_kernel_without_the_race_passes(name):
    run(cured(BUGS[name][0]))


def test_it_takes_both_checks():
    for checks in (("race",), ("global",)):
        body = SETUP + PLACES + broken(BUGS["written by two warps"][0])
        launch(body, np.zeros(1024, np.uint8), checks=checks)


def test_all_may_write_one_value():
    run("mov.b32 %r9, 5; st.global.b32 [%rd0], %r9;")
    with pytest.raises(Race, match="warp 1 writes global memory .* the write by warp 0"):
        run("shr.u32 %r9, %r0, 5; st.global.b32 [%rd0], %r9;")
