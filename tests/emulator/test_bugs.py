"""One bug per check, in a few lines of PTX, that must be found; and the twin that must pass.

As in test_races.py, a body holds the cure between {{ }} and a bug to add between [[ ]].
"""

import numpy as np
import pytest

from fa3.emulator import errors

from .ptx_runner import launch
from .test_races import DRAIN, LOAD, SETUP, STORE, WAIT_FOR_LOAD, WRITE, broken, cured

# A (64 x 16, in registers %r20..%r23 or shared memory) times B (16 x 8, shared memory)
OPERANDS = """
    cvt.u64.u32 %rd1, %r3;
    shr.u64 %rd1, %rd1, 4;
    or.b64 %rd1, %rd1, 0x0000000800080000;
    mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
    mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
"""
FENCE = "wgmma.fence.sync.aligned;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1,%f2,%f3,%f4},"
SHARED = PRODUCT + "%rd1, %rd1, 1, 1, 1, 0, 0;"
REGISTERS = PRODUCT + "{%r20,%r21,%r22,%r23}, %rd1, 1, 1, 1, 0;"
SMALLER = "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%f1,%f2}, %rd1, %rd1, 1, 1, 1, 0, 0;"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
READ = "add.f32 %f5, %f3, %f3;"
CHAINED = (
    PRODUCT.replace("%f1,%f2,%f3,%f4", "%f5,%f6,%f7,%f8") + "{%f1,%f2,%f3,%f4}, %rd1, 1, 1, 1, 0;"
)
MORE = LOAD[LOAD.index("@%p1 cp") :].replace("[%r3]", "[%r3+512]")
WAIT = WAIT_FOR_LOAD
EXPECT = "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64"
COPY = (
    "cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %rd1, %rd0; cp.async.ca.shared.global [%r1], [%rd1], 4;"
)
ARRIVE = "mbarrier.arrive.shared.b64 _,"
PROXY_FENCE = "fence.proxy.async.shared::cta;"
OTHERS = "setp.lt.u32 %p4, %r0, 96; @%p4 bra OTHERS;"

# of each: checks, body, error, message
BUGS = {
    "no fence before the first wgmma": (
        "fence",
        OPERANDS + "{{" + FENCE + "}}" + SHARED + DONE,
        errors.MissingWgmmaFence,
        "the first wgmma of a warpgroup has no wgmma.fence before it",
    ),
    "accumulator read between wgmmas": (
        "fence",
        OPERANDS + FENCE + SHARED + DONE + READ + "{{" + FENCE + "}}" + SHARED + DONE,
        errors.MissingWgmmaFence,
        r"register %f3 of this wgmma was last used at PTX line \d+: add.f32 %f5",
    ),
    "A fragment written after the fence": (
        "fence",
        OPERANDS + FENCE + SHARED + "mov.b32 %r21, %r0; {{" + FENCE + "}}" + REGISTERS + DONE,
        errors.MissingWgmmaFence,
        r"register %r21 of this wgmma was last used at PTX line \d+: mov.b32 %r21",
    ),
    "accumulator of another shape": (
        "fence",
        OPERANDS + FENCE + SHARED + "{{" + FENCE + "}}" + SMALLER + DONE,
        errors.MissingWgmmaFence,
        r"accumulator register %f1 \(and 1 more\) of a wgmma of another shape",
    ),
    "A fragment that is still an accumulator": (
        "wgmma",
        OPERANDS + FENCE + SHARED + "{{" + DONE + "}}" + CHAINED + DONE,
        errors.RegisterInFlight,
        "is the accumulator of a wgmma in flight and an A operand of this one",
    ),
    "fewer bytes expected than are loaded": (
        "mbarrier",
        "{{" + EXPECT + " [%r4], 512;}}" + LOAD + MORE + WAIT,
        errors.BarrierMisuse,
        r"ends with 512 bytes more than expected \(0 bytes expected, 512 came\)",
    ),
    "more bytes expected than are loaded": (
        "mbarrier",
        "[[" + EXPECT + " [%r5], 512;]]" + LOAD + WAIT,
        errors.BarrierMisuse,
        r"(?s)ends with 512 bytes fewer than expected \(512 bytes expected, 0 came\)"
        r".*mbarrier.expect_tx",
    ),
    "bytes waited for that nobody loads": (
        "",
        "[[" + EXPECT + " [%r4], 512;]]" + LOAD + WAIT,
        errors.Deadlock,
        "mbarrier 0x800 parity 0 .* 1024 bytes expected, 512 came",
    ),
    "an mbarrier that the async proxy may not see": (
        "proxy",
        "bar.sync 0; @%p1 mbarrier.init.shared.b64 [%r3+2064], 1;"
        "{{@%p1 fence.mbarrier_init.release.cluster;}} bar.sync 0;"
        + LOAD.replace("[%r4]", "[%r3+2064]"),
        errors.MissingProxyFence,
        "the mbarrier at 0x810, which thread 0 initialised without a fence.mbarrier_init since",
    ),
    "a proxy fence that the store need not come after": (
        "proxy race",
        WRITE + "bar.sync 0;" + PROXY_FENCE + "{{bar.sync 0;}}" + STORE + DRAIN,
        errors.MissingProxyFence,
        r"bulk store of warp 0 reads .* written through the generic proxy by warp \d, whose "
        r"fence.proxy.async at PTX line \d+: fence.proxy.async.* no barrier leads from there",
    ),
    "a proxy fence of another lane that the store need not come after": (
        "proxy race",
        "@%p2 "
        + WRITE
        + "bar.warp.sync -1;"
        + PROXY_FENCE
        + "{{bar.warp.sync -1;}}"
        + STORE
        + DRAIN,
        errors.MissingProxyFence,
        "written through the generic proxy by warp 0, whose fence.proxy.async",
    ),
    "a proxy fence before the last write": (
        "proxy race",
        WRITE + PROXY_FENCE + "[[" + WRITE + "]] bar.sync 0;" + STORE + DRAIN,
        errors.MissingProxyFence,
        "by thread 0, without fence.proxy.async since",
    ),
    "a proxy fence before the wait for what was copied": (
        "proxy race late",
        COPY + "[[" + PROXY_FENCE + "]] cp.async.wait_all;{{" + PROXY_FENCE + "}}"
        "bar.sync 0;" + STORE + DRAIN,
        errors.MissingProxyFence,
        "by thread 0, without fence.proxy.async since",
    ),
    "a proxy fence for copies that the store need not come after": (
        "proxy race",
        COPY + "cp.async.wait_all; bar.sync 0;" + PROXY_FENCE + "{{bar.sync 0;}}" + STORE + DRAIN,
        errors.MissingProxyFence,
        r"bulk store of warp 0 reads .* written through the generic proxy by warp \d, whose "
        r"fence.proxy.async at PTX line \d+: fence.proxy.async.* no barrier leads from there",
    ),
    "a second initialisation": (
        "mbarrier",
        "{{@%p1 mbarrier.inval.shared.b64 [%r4];}} @%p1 mbarrier.init.shared.b64 [%r4], 2;",
        errors.BarrierMisuse,
        "mbarrier at 0x800 is initialised again without mbarrier.inval",
    ),
    "more arrivals than the count": (
        "",
        "@!%p1 bra END; mbarrier.init.shared.b64 [%r3+2064], 2; "
        + ARRIVE
        + "[%r3+2064]; [["
        + ARRIVE
        + "[%r3+2064], 2;]] END:",
        errors.BarrierMisuse,
        "more arrivals than its count of 2 in one phase",
    ),
    "fewer arrivals than the count": (
        "",
        "{{@%p1 " + ARRIVE + "[%r4];}}" + WAIT,
        errors.Deadlock,
        r"mbarrier 0x800 parity 0 \(phase 0, 1 of 1 arrivals outstanding, no bytes expected\)",
    ),
    "a phase that completes before the last one was seen": (
        "mbarrier",
        # warp 3 waits for phase 0; thread 0 goes on without hearing from it
        OTHERS
        + WAIT
        + "bra END; OTHERS: @!%p1 bra END;"
        + ARRIVE
        + "[%r4];"
        + "[["
        + ARRIVE
        + "[%r4];]] END:",
        errors.BarrierMisuse,
        "completes phase 1 while a warp still waits for the end of phase 0",
    ),  # fmt: skip
    "more registers than the file has": (
        "",
        "setp.lt.u32 %p4, %r0, 128; @%p4 bra LESS; setmaxnreg.inc.sync.aligned.u32 240; bra END;"
        "LESS: {{setmaxnreg.dec.sync.aligned.u32 24;}} [[setmaxnreg.dec.sync.aligned.u32 40;]]"
        "END:",
        errors.Deadlock,
        "setmaxnreg to 240: needs 9216 registers more, 8192 are free",
    ),
    "setmaxnreg in the wrong direction": (
        "",
        "{{setmaxnreg.dec.sync.aligned.u32 24;}} [[setmaxnreg.dec.sync.aligned.u32 240;]]",
        errors.KernelError,
        "setmaxnreg.dec to 240 of warps that have 168 registers a thread",
    ),
}


def run(name: str, version) -> None:
    checks, body, *_ = BUGS[name]
    threads = 384 if "setmaxnreg" in body else 128
    launch(SETUP + version(body), np.zeros(1024, np.uint8), threads, checks=checks.split())


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found(name):
    *_, error, message = BUGS[name]
    with pytest.raises(error, match=message):
        run(name, broken)


@pytest.mark.parametrize("name", BUGS)
def test_the_kernel_without_the_bug_passes(name):
    run(name, cured)


# of two CTAs of 128 threads; %r1 a word per thread, %r5 the CTA, %rd2 its word in global memory
ACROSS = """
    mov.u32 %r5, %ctaid.x; shl.b32 %r1, %r0, 2;
    cvt.u64.u32 %rd1, %r1; add.s64 %rd2, %rd0, %rd1;
    setp.eq.u32 %p1, %r5, 0; setp.eq.u32 %p2, %r0, 0;
"""
APART = "{{mul.lo.u32 %r2, %r5, 512; cvt.u64.u32 %rd3, %r2; add.s64 %rd2, %rd2, %rd3;}}"
FLAG = "bar.sync 0; @%p2 red.release.gpu.global.add.u32 [%rd0+4000], 1;"
SEEN = "@%p2 atom.acquire.gpu.global.add.u32 %r9, [%rd0+4000], 1; bar.sync 0;"
# name: body, message
GLOBAL = {
    "two CTAs write": (
        APART + "st.global.b32 [%rd2], %r0;",
        r"cluster 1 of the grid writes .* that cluster 0 accesses at PTX line \d+: st.global",
    ),
    "one writes, another reads": (
        APART + "@%p1 st.global.b32 [%rd2], %r0; @!%p1 ld.global.b32 %r9, [%rd2];",
        r"cluster 1 of the grid reads .* that cluster 0 accesses at PTX line \d+: @%p1 st.global",
    ),
    "one reads, another writes": (
        APART + "@!%p1 st.global.b32 [%rd2], %r0; @%p1 ld.global.b32 %r9, [%rd2];",
        r"cluster 1 of the grid writes .* that cluster 0 accesses at PTX line \d+: @%p1 ld.global",
    ),
    "written after the flag": (
        "@!%p1 bra READ; {{st.global.b32 [%rd2], %r0;}}"
        + FLAG
        + "[[st.global.b32 [%rd2], %r0;]] bra END; READ:"
        + SEEN
        + "ld.global.b32 %r9, [%rd2]; END:",
        "no atomic leads from one to the other",
    ),
    "the flag is not looked at": (
        "@!%p1 bra READ; st.global.b32 [%rd2], %r0;"
        + FLAG
        + "bra END; READ: {{"
        + SEEN
        + "}} ld.global.b32 %r9, [%rd2]; END:",
        "no atomic leads from one to the other",
    ),
    "a bulk store over another's": (
        APART + "mov.u32 %r3, buffer;"
        "@%p2 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r3], 512;"
        "@%p2 cp.async.bulk.commit_group; @%p2 cp.async.bulk.wait_group.read 0;",
        r"cluster 1 of the grid writes .* cluster 0 accesses at PTX line \d+: @%p2 cp.async.bulk",
    ),
}


# of CTA 0 to CTA 1, as FLAG and SEEN are, whose warps are looked at one by one
HANDED_ON = "@!%p1 bra READ; {write} {flag} bra END; READ: {seen} ld.global.b32 %r9, [%rd2]; END:"
STORED = "st.global.b32 [%rd2], %r0;"
RAISED = "@%p2 red.relaxed.gpu.global.add.u32 [%rd0+4000], 1;"
LOOKED = "@%p2 ld.relaxed.gpu.global.u32 %r9, [%rd0+4000];"
BULK = (
    "mov.u32 %r3, buffer; @%p2 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r3], 512;"
    "@%p2 cp.async.bulk.commit_group;"
)
STORE_ENDS = "@%p2 cp.async.bulk.wait_group 0;"
# name: what the first does, its flag, how the second sees it
BETWEEN_WARPS = {
    "the flag goes up before all warps have written": (
        STORED, "{{bar.sync 0;}}" + FLAG.removeprefix("bar.sync 0;"), SEEN
    ),
    "the others do not wait for the warp that looks": (
        STORED, FLAG, SEEN.removesuffix("bar.sync 0;") + "{{bar.sync 0;}}"
    ),
    "no fence before a relaxed flag": (
        STORED, "bar.sync 0; {{fence.acq_rel.gpu;}}" + RAISED, SEEN
    ),
    "a fence of the CTA alone before it": (
        STORED, "bar.sync 0; {{membar.gl;}} [[membar.cta;]]" + RAISED, SEEN
    ),
    "no fence after a relaxed look": (
        STORED, FLAG, LOOKED + "{{fence.acq_rel.gpu;}} bar.sync 0;"
    ),
    "a flag of the CTA alone": (
        STORED, "{{" + FLAG + "}} [[" + FLAG.replace(".gpu", ".cta") + "]]", SEEN
    ),
    "the flag goes up while a bulk store runs": (
        BULK + "{{" + STORE_ENDS + "}}", FLAG + "[[" + STORE_ENDS + "]]", SEEN
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN_WARPS)
def test_what_a_flag_leaves_out_is_found(name):
    write, flag, seen = BETWEEN_WARPS[name]
    body = HANDED_ON.format(write=write, flag=flag, seen=seen)
    with pytest.raises(errors.Race, match="no atomic leads from one to the other"):
        across(broken(body), ("race", "global"))
    across(cured(body), ("race", "global"))


def test_a_third_cta_knows_what_the_second_was_told():
    """And not what nobody told it."""
    hand_on = "setp.eq.u32 %p3, %r5, {cta}; @%p3 bra DO{cta};"
    body = (
        "".join(hand_on.format(cta=i) for i in range(3))
        + f"DO0: {STORED} {FLAG} bra END;"
        + f"DO1: {SEEN} {{{{{FLAG.replace('4000', '4004')}}}}} bra END;"
        + f"DO2: {SEEN.replace('4000', '4004')} ld.global.b32 %r9, [%rd2]; END:"
    )
    checks = ("race", "global")
    across(cured(body), checks, grid=3)
    with pytest.raises(errors.Race, match="cluster 2 of the grid reads"):
        across(broken(body), checks, grid=3)


ADDED = "red.global.add.f32 [%rd2], 0f3F800000;"
SUMS = {
    "of two CTAs": ADDED,
    "of one CTA's warps": "@!%p1 bra END; red.global.add.f32 [%rd0], 0f3F800000; END:",
    "in bulk": BULK.replace("cp.async.bulk.global", "cp.reduce.async.bulk.global").replace(
        "bulk_group [", "bulk_group.add.f32 ["
    )
    + STORE_ENDS,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_in_no_order_are_found(name):
    checks = ("race", "global", "sums")
    with pytest.raises(errors.Race, match="the sum depends on which comes first"):
        across(broken(SUMS[name]), checks)
    across(broken(SUMS[name]), checks[:2])
    across(broken(SUMS[name]).replace("f32", "u32"), checks)


@pytest.mark.parametrize("add", [ADDED, SUMS["in bulk"]])
def test_sums_in_order_pass(add):
    turn = f"@!%p1 bra SECOND; {add} {FLAG} bra END; SECOND: {{{{{SEEN}}}}} {add} END:"
    checks = ("race", "global", "sums")
    across(cured(turn), checks)
    with pytest.raises(errors.Race, match="cluster 1 .* unordered with the addition by cluster 0"):
        across(broken(turn), checks)


def across(body: str, checks=("global",), grid: int = 2) -> None:
    launch(ACROSS + body, np.zeros(4096, np.uint8), grid=grid, checks=checks)


@pytest.mark.parametrize("name", GLOBAL)
def test_a_race_of_ctas_is_found(name):
    body, message = GLOBAL[name]
    with pytest.raises(errors.Race, match=message):
        across(broken(body))


@pytest.mark.parametrize("name", GLOBAL)
def test_ctas_that_do_not_race_pass(name):
    across(cured(GLOBAL[name][0]))


def test_registers_at_launch_are_at_most_those_of_the_file():
    """ptxas may choose fewer than 168 for 384 threads, from which 152 is more."""
    grow = "setmaxnreg.inc.sync.aligned.u32 152;"
    launch(SETUP + grow, np.zeros(1024, np.uint8), 384)
    with pytest.raises(errors.KernelError, match="setmaxnreg.inc to 144 of warps that have 152"):
        launch(SETUP + grow + grow.replace("152", "144"), np.zeros(1024, np.uint8), 384)
