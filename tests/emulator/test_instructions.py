"""Instructions and control flow on hand-written PTX, against numpy."""

import numpy as np
import pytest

from fa3.emulator.errors import (
    BarrierMisuse,
    Deadlock,
    KernelError,
    Misaligned,
    OutOfBounds,
    Unsupported,
)

from .ptx_runner import HEADER, lanes, launch

RNG = np.random.default_rng(0)
X = RNG.integers(0, 2**32, 128, dtype=np.uint32)
Y = RNG.integers(0, 2**32, 128, dtype=np.uint32)
S, T = X.view(np.int32), Y.view(np.int32)
F = (RNG.standard_normal(128) * 10).astype(np.float32)
G = RNG.standard_normal(128).astype(np.float32)
TID = np.arange(128, dtype=np.uint32)
u4 = np.uint32

INTEGER = {
    "add.s32 %r9, %r1, %r2;": X + Y,
    "sub.s32 %r9, %r1, 5;": X - u4(5),
    "mul.lo.s32 %r9, %r1, %r2;": X * Y,
    "mad.lo.s32 %r9, %r1, %r2, %r1;": X * Y + X,
    "mul.hi.u32 %r9, %r1, %r2;": (X.astype(np.uint64) * Y >> np.uint64(32)).astype(u4),
    "div.u32 %r9, %r1, %r2;": X // Y,
    "rem.u32 %r9, %r1, %r2;": X % Y,
    "rem.s32 %r9, %r1, 7;": np.fmod(S, 7).view(u4),
    "min.s32 %r9, %r1, %r2;": np.minimum(S, T).view(u4),
    "max.u32 %r9, %r1, %r2;": np.maximum(X, Y),
    "abs.s32 %r9, %r1;": np.abs(S).view(u4),
    "neg.s32 %r9, %r1;": -X,
    "not.b32 %r9, %r1;": ~X,
    "xor.b32 %r9, %r1, %r2;": X ^ Y,
    "shl.b32 %r9, %r1, 33;": X * u4(0),
    "shl.b32 %r9, %r1, %r0;": np.where(TID < 32, X << np.minimum(TID, 31), 0).astype(u4),
    "shr.u32 %r9, %r1, %r0;": np.where(TID < 32, X >> np.minimum(TID, 31), 0).astype(u4),
    "shr.s32 %r9, %r1, %r0;": (S >> np.minimum(TID, 31).astype(np.int32)).view(u4),
    "popc.b32 %r9, %r1;": np.bitwise_count(X).astype(u4),
    "prmt.b32 %r9, %r1, %r2, 0x5410;": (X & u4(0xFFFF)) | (Y << u4(16)),
    "cvt.s32.s8 %r9, %r1;": X.astype(np.int8).astype(np.int32).view(u4),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1;": np.where(S < T, 1, 2).astype(u4),
    "setp.lt.and.s32 %p2, 0, 1, %p1; @%p2 mov.b32 %r9, 3;": X * u4(0),
    "setp.gt.u32 %p1, %r1, %r2; @!%p1 mov.b32 %r9, %r1;": np.where(X > Y, 0, X).astype(u4),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};": X >> u4(16) | X << u4(16),
}


@pytest.mark.parametrize("code", INTEGER)
def test_integer(code):
    np.testing.assert_array_equal(lanes(code, inputs=(X, Y)), INTEGER[code])


FLOAT = {
    "add.f32 %r9, %r1, %r2;": F + G,
    "sub.ftz.f32 %r9, %r1, %r2;": F - G,
    "mul.f32 %r9, %r1, 0f40000000;": F * np.float32(2),
    "fma.rn.f32 %r9, %r1, %r2, %r1;": (F.astype(np.float64) * G + F).astype(np.float32),
    "ex2.approx.f32 %r9, %r1;": np.exp2(F),
    "abs.f32 %r3, %r1; lg2.approx.f32 %r9, %r3;": np.log2(np.abs(F)),
    "rcp.approx.f32 %r9, %r1;": np.float32(1) / F,
    "abs.f32 %r3, %r1; sqrt.rn.f32 %r9, %r3;": np.sqrt(np.abs(F)),
    "div.rn.f32 %r9, %r1, %r2;": F / G,
    "neg.f32 %r9, %r1;": -F,
    "abs.f32 %r9, %r1;": np.abs(F),
    "max.f32 %r9, %r1, %r2;": np.fmax(F, G),
    "min.NaN.f32 %r9, %r1, %r2;": np.minimum(F, G),
    "max.f32 %r9, %r1, 0f7FC00000;": F,
    "setp.geu.f32 %p1, %r1, 0f7FC00000; selp.f32 %r9, %r1, %r2, %p1;": F,
    "setp.neu.f32 %p1, %r1, %r1; selp.f32 %r9, %r1, %r2, %p1;": G,
    "copysign.f32 %r9, %r1, %r2;": np.copysign(G, F),
    "cvt.rn.f32.s32 %r9, %r0;": TID.astype(np.float32),
    "cvt.rn.f16x2.f32 %r9, %r1, %r2;": np.stack([G, F], 1)
    .astype(np.float16)
    .view(np.float32)[:, 0],
}


@pytest.mark.parametrize("code", FLOAT)
def test_float(code):
    with np.errstate(all="ignore"):
        got = lanes(code, inputs=(F, G)).view(np.float32)
    np.testing.assert_array_equal(got, FLOAT[code])


def test_64_bit():
    a = RNG.integers(0, 2**64, 128, dtype=np.uint64)
    got = lanes("mad.lo.s64 %rd6, %rd1, 3, %rd2;", "%rd6", (a, a[::-1].copy()), size=8)
    np.testing.assert_array_equal(got, a * np.uint64(3) + a[::-1])
    wide = lanes("mad.wide.u32 %rd6, %r1, %r2, 1;", "%rd6", (X, Y), size=8)
    np.testing.assert_array_equal(wide, X.astype(np.uint64) * Y + np.uint64(1))


def test_divergent_loop_reconverges():
    """Every lane counts to its own number; the sum over the warp needs all of them back."""
    code = """
        mov.b32 %r3, 0;
        $LOOP:
        setp.ge.u32 %p1, %r3, %r0;
        @%p1 bra $DONE;
        add.s32 %r3, %r3, 1;
        bra $LOOP;
        $DONE:
        redux.sync.add.u32 %r9, %r3, -1;"""
    assert (lanes(code).reshape(4, 32) == TID.reshape(4, 32).sum(1)[:, None]).all()


@pytest.mark.parametrize("mask", ["-1", "0xFFFFFFFF", "%r4"])
def test_lanes_of_a_mask_wait_for_those_behind_them(mask):
    """Some lanes come to the sum by a detour that lies after it."""
    code = f"""
        mov.b32 %r4, -1;
        and.b32 %r3, %r0, 1;
        setp.eq.u32 %p1, %r3, 0;
        @%p1 bra $DETOUR;
        $SUM:
        redux.sync.add.u32 %r9, %r0, {mask};
        bra $END;
        $DETOUR:
        bra $SUM;
        $END:"""
    assert (lanes(code).reshape(4, 32) == TID.reshape(4, 32).sum(1)[:, None]).all()


def test_warp_communication():
    down = lanes("shfl.sync.down.b32 %r9, %r0, 1, 31, -1;")
    assert (down == np.where(TID % 32 == 31, TID, TID + 1)).all()
    butterfly = lanes("xor.b32 %r3, %r0, 5; shfl.sync.idx.b32 %r9, %r0, %r3, 31, -1;")
    assert (butterfly == TID ^ 5).all()
    ballot = "setp.lt.u32 %p1, %r1, %r2; vote.sync.ballot.b32 %r9, %p1, -1;"
    votes = np.packbits((X < Y).reshape(4, 32), axis=1, bitorder="little").view(u4)
    assert (lanes(ballot, inputs=(X, Y)).reshape(4, 32) == votes).all()
    elected = lanes("elect.sync %r3|%p1, -1; selp.b32 %r9, 1, 0, %p1;")
    assert (elected == (TID % 32 == 0)).all()


def test_a_warp_that_is_complete_does_not_wait_for_one_that_is_not():
    """They come to the shuffle as one fragment; only what stands after it sets a lane free."""
    code = """
        mov.b32 %r9, 0;
        setp.ne.u32 %p1, %r0, 0; @%p1 bra $READY;
        mbarrier.init.shared.b64 [buffer], 1;
        $READY: bar.sync 0;
        @%p1 bra $MEET;
        $WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [buffer], 0; @!%p2 bra $WAIT;
        $MEET: shfl.sync.idx.b32 %r9, %r0, 3, 31, -1;
        setp.ne.u32 %p3, %r0, 32; @%p3 bra $END;
        mbarrier.arrive.shared.b64 %rd5, [buffer];
        $END:"""
    assert lanes(code).tolist() == [3] * 32 + [35] * 32 + [67] * 32 + [99] * 32


def test_shared_memory_and_barrier():
    code = """
        mov.u32 %r3, buffer; shl.b32 %r4, %r0, 2; add.s32 %r5, %r3, %r4;
        st.shared.b32 [%r5], %r1;
        bar.sync 0;
        sub.s32 %r6, %r3, %r4;
        ld.shared.b32 %r9, [%r6+508];"""
    np.testing.assert_array_equal(lanes(code, inputs=(X,)), X[::-1])


@pytest.mark.parametrize(
    "code, expected",
    [
        ("atom.global.add.u32 %r9, [%rd0], 2;", 256),
        ("red.global.max.u32 [%rd0], %r0;", 127),
        ("atom.global.cas.b32 %r9, [%rd0], 0, 5;", 5),
        ("atom.global.exch.b32 %r9, [%rd0], %r0;", 127),
        ("red.global.inc.u32 [%rd0], 99;", 28),
    ],
)
def test_atomics(code, expected):
    array = np.zeros(4, u4)
    launch(code, array)
    assert array[0] == expected


def test_atomics_return_old_values():
    code = (
        "atom.global.add.u32 %r9, [%rd0], 1; mul.wide.u32 %rd1, %r0, 4; "
        "add.s64 %rd2, %rd0, %rd1; st.global.b32 [%rd2+16], %r9;"
    )
    array = np.zeros(132, u4)
    launch(code, array)
    assert sorted(array[4:]) == list(range(128))


def test_grid_and_cluster_registers():
    code = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %clusterid.x;
        mad.lo.s32 %r4, %r2, 10, %r1; mad.lo.s32 %r4, %r3, 100, %r4;
        mul.wide.u32 %rd1, %r1, 4; add.s64 %rd2, %rd0, %rd1; st.global.b32 [%rd2], %r4;"""
    array = np.zeros(6, u4)
    launch(code, array, threads=32, grid=6, cluster=2)
    assert array.tolist() == [i + 10 * (i % 2) + 100 * (i // 2) for i in range(6)]


def test_remote_shared_memory():
    """Each CTA of a pair writes its rank into the other's shared memory."""
    code = """
        mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mov.u32 %r3, buffer;
        mapa.shared::cluster.u32 %r4, %r3, %r2;
        st.shared::cluster.b32 [%r4], %r1;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        ld.shared.b32 %r5, [buffer];
        mul.wide.u32 %rd1, %r1, 4; add.s64 %rd2, %rd0, %rd1; st.global.b32 [%rd2], %r5;"""
    array = np.full(2, 9, u4)
    launch(code, array, threads=32, grid=2, cluster=2)
    assert array.tolist() == [1, 0]


# of a pair of CTAs with a warp each: %r1 the rank, %p2 CTA 0, %p1 its first lane
PAIR = """
    mov.u32 %r1, %cluster_ctarank; setp.eq.u32 %p2, %r1, 0; setp.eq.and.u32 %p1, %r0, 0, %p2;
    mov.u32 %r3, buffer; add.u32 %r4, %r3, 2048; setp.eq.u32 %p3, %r0, 0;
"""
ARRIVE = "barrier.cluster.arrive.release.aligned;"
MEET = ARRIVE + "barrier.cluster.wait.acquire.aligned;"


@pytest.mark.parametrize("mask", [1, 2, 3])
def test_multicast(mask):
    """One CTA loads 16 bytes for those of the mask, and each barrier there counts them."""
    code = f"""{PAIR}
        @%p3 mbarrier.init.shared.b64 [%r4], 1; @%p3 fence.mbarrier_init.release.cluster;
        mov.u32 %r5, 7; @%p3 st.shared.b32 [buffer], %r5; {MEET}
        shr.u32 %r6, {mask}, %r1; and.b32 %r6, %r6, 1; shl.b32 %r6, %r6, 4; mov.u16 %rs1, {mask};
        @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%r4], %r6;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [%r3], [%rd0], 16, [%r4], %rs1;
        WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%r4], 0; @!%p4 bra WAIT; {MEET}
        ld.shared.b32 %r9, [buffer]; mul.wide.u32 %rd1, %r1, 4; add.s64 %rd2, %rd0, %rd1;
        st.global.b32 [%rd2+16], %r9;"""
    array = np.array([5, 0, 0, 0, 9, 9, 0, 0], u4)
    launch(code, array, threads=32, grid=2, cluster=2, checks=("race", "proxy", "mbarrier"))
    assert array[4:6].tolist() == [5 if mask >> rank & 1 else 7 for rank in range(2)]


REMOTE = "mapa.shared::cluster.u32 %r5, %r3, 0; @!%p2 st.shared::cluster.b32 [%r5], %r0;"


@pytest.mark.parametrize(
    "code, error, message",
    [
        (REMOTE, KernelError, "CTA 0 of the cluster, all threads of which have exited"),
        ("barrier.cluster.wait.acquire.aligned;", BarrierMisuse, "wait without a .*arrive before"),
        (MEET + "barrier.cluster.wait.acquire.aligned;", BarrierMisuse, "wait without a .*arrive"),
        (ARRIVE + MEET, BarrierMisuse, "arrive twice without a barrier.cluster.wait between"),
    ],
)
def test_misuse_of_a_cluster(code, error, message):
    with pytest.raises(error, match=message):
        launch(PAIR + code, np.zeros(4, u4), threads=32, grid=2, cluster=2)
    launch(PAIR + REMOTE + MEET + MEET, np.zeros(4, u4), threads=32, grid=2, cluster=2)


@pytest.mark.parametrize(
    "code, error, message",
    [
        ("st.global.b32 [%rd0+4096], %r0;", OutOfBounds, "after the start of the nearest"),
        ("ld.global.b32 %r1, [%rd0+-8];", OutOfBounds, "8 bytes before the start of the nearest"),
        ("ld.shared.b32 %r1, [buffer+4096];", OutOfBounds, "outside the CTA's 0x1000 bytes"),
        ("ld.shared.b32 %r1, [buffer+-4];", OutOfBounds, "shared access at 0xfffffffc"),
        ("ld.shared.v4.b32 {%r1,%r2,%r3,%r4}, [buffer+8];", Misaligned, "16-byte"),
        ("ld.global.b64 %rd1, [%rd0+4];", Misaligned, "8-byte global read"),
        ("bar.sync 1, 100;", BarrierMisuse, "not a multiple"),
        ("bar.sync 16;", BarrierMisuse, "there are 16"),
        ("bar.sync 3, 256;", Deadlock, "barrier 3: 128 of 256 threads arrived"),
        ("trap;", RuntimeError, "trap executed"),
        ("tcgen05.alloc.b32 [buffer], 32;", Unsupported, "not emulated: tcgen05.alloc"),
        ("setp.eq.bf16x2 %p1, %r1, %r2;", Unsupported, "comparison of halves"),
        ("mov.u32 %r1, %pm0;", Unsupported, "special register %pm0"),
    ],
)
def test_errors_name_the_instruction(code, error, message):
    with pytest.raises(error, match=message) as caught:
        launch(code, np.zeros(16, u4))
    line = (HEADER + code).count("\n", 0, len(HEADER)) + 1
    assert f"PTX line {line}: {code.rstrip(';')}" in str(caught.value)


def test_an_error_in_the_middle_of_a_segment_names_its_own_line():
    code = "add.s32 %r1, %r0, 1;\nst.global.b32 [%rd0+4096], %r1;\nadd.s32 %r2, %r1, 1;"
    with pytest.raises(OutOfBounds, match=r"PTX line \d+: st\.global\.b32 \[%rd0\+4096\]"):
        launch(code, np.zeros(16, u4))


def test_long_loops_without_events_are_no_deadlock():
    code = "mov.b32 %r9, 0; $L: add.s32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 30000; @%p1 bra $L;"
    assert (lanes(code, threads=32) == 30000).all()


def test_endless_loops_are_stopped():
    with pytest.raises(RuntimeError, match="an endless loop"):
        launch("$L: bra $L;", np.zeros(4, u4), threads=32)
