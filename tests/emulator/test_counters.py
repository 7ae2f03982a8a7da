"""Counters of tiny programs: classes of instructions, banks of shared memory, bytes, waits."""

import inspect

import numpy as np
import pytest

from fa3.emulator import Options, Profile
from fa3.emulator.profiling import clock
from fa3.emulator.profiling.instruments import INSTRUMENTS

from .ptx_runner import launch


def profiled(body, threads=128, array=None, **options):
    """The profile of one launch."""
    profile = Profile()
    array = np.zeros(4096, np.uint32) if array is None else array
    launch(body, array, threads, profile=profile, **options)
    (found,) = profile.launches
    return found


def counted(body, threads=128, **options):
    return profiled(body, threads, **options).total


def test_instructions_by_class():
    before = counted("").instructions  # the header's, and ret
    body = """
        add.s32 %r1, %r0, 1; and.b32 %r2, %r1, 3; setp.lt.u32 %p1, %r0, 5;
        cvt.rn.f32.u32 %f1, %r0; fma.rn.f32 %f2, %f1, %f1, %f1; max.f32 %f2, %f2, %f1;
        ex2.approx.ftz.f32 %f3, %f2; rcp.approx.f32 %f4, %f3;
        mov.u32 %r3, buffer; st.shared.b32 [%r3], %r1; bar.sync 0;
        ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd0], %r4; shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
    """
    after = counted(body).instructions
    found = {name: (n - before.get(name, 0)) / 4 for name, n in after.items()}
    assert found == {
        "integer": 3,
        "convert": 1,
        "float": 1,
        "compare": 1,
        "exp2": 1,
        "mufu": 1,
        "move": 1,
        "shared": 2,
        "sync": 1,
        "global": 1,
        "warp": 1,
        "control": 0,
    }


def test_only_the_lanes_and_warps_that_take_part_are_counted():
    body = """
        setp.lt.u32 %p1, %r0, 40; @!%p1 bra END;
        ex2.approx.f32 %f1, %f1; ex2.approx.f32 %f1, %f1;
        END:
    """
    found = counted(body)
    assert (found.instructions["exp2"], found.lanes["exp2"], found.exponentials) == (4, 80, 80)


def test_a_loop_counts_each_time():
    body = """
        mov.u32 %r1, 0;
        LOOP: ex2.approx.ftz.f16x2 %r2, %r2; add.s32 %r1, %r1, 1;
        setp.lt.u32 %p1, %r1, 7; @%p1 bra LOOP;
    """
    assert counted(body, threads=32).exponentials == 7 * 32 * 2


@pytest.mark.parametrize(
    ("stride", "kind", "wavefronts", "conflicts"),
    [  # bytes between lanes, wavefronts of a warp, those beyond the fewest
        (4, "b32", 1, 0),
        (0, "b32", 1, 0),  # all lanes one word
        (8, "b32", 2, 1),
        (12, "b32", 1, 0),
        (128, "b32", 32, 31),
        (2, "b16", 1, 0),
        (8, "b64", 2, 0),
        (16, "b64", 4, 2),
        (16, "v4.b32", 4, 0),
        (32, "v4.b32", 8, 4),
        (80, "v4.b32", 4, 0),
        (128, "v4.b32", 32, 28),
    ],
)
def test_bank_conflicts(stride, kind, wavefronts, conflicts):
    registers = {"b16": "%rs1", "b32": "%r2", "b64": "%rd1", "v4.b32": "{%r2, %r3, %r4, %r5}"}
    body = f"""
        mov.u32 %r9, buffer; mad.lo.u32 %r1, %r0, {stride}, %r9;
        st.shared.{kind} [%r1], {registers[kind]}; ld.shared.{kind} {registers[kind]}, [%r1];
    """
    launch = profiled(body, threads=32)
    for found in launch.total.shared.values():
        assert (found.instructions, found.wavefronts) == (1, wavefronts)
        assert found.conflicts == conflicts
    assert sum(launch.conflicts.values()) == 2 * conflicts
    assert all(place.startswith("PTX line ") for place in launch.conflicts)


def test_lanes_that_are_off_cause_no_conflict():
    body = """
        mov.u32 %r9, buffer; mad.lo.u32 %r1, %r0, 128, %r9;
        setp.lt.u32 %p1, %r0, 3; @%p1 ld.shared.b32 %r2, [%r1];
    """
    found = counted(body, threads=32).shared["ld"]
    assert (found.wavefronts, found.conflicts) == (3, 2)


def test_generic_addresses_of_shared_memory_have_banks_too():
    body = """
        cvta.shared.u64 %rd1, buffer; mul.wide.u32 %rd2, %r0, 8; add.s64 %rd1, %rd1, %rd2;
        st.b32 [%rd1], %r0; ld.b32 %r1, [%rd1];
    """
    body = body.replace(
        "cvta.shared.u64 %rd1, buffer",
        "mov.u32 %r9, buffer; cvt.u64.u32 %rd3, %r9; cvta.shared.u64 %rd1, %rd3",
    )
    found = counted(body, threads=32)
    assert [found.shared[kind].conflicts for kind in ("st", "ld")] == [1, 1]
    assert found.bytes.loaded == found.bytes.stored == 0


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (128, 4 * 7), (144, 0), (32, 4 * 1)])
@pytest.mark.parametrize("kind", ["ldmatrix", "stmatrix"])
def test_bank_conflicts_of_matrices(kind, stride, conflicts):
    """Lane i gives row i % 8 of matrix i / 8; here rows are `stride` bytes apart."""
    operands = ["{%r1, %r2, %r3, %r4}", "[%r5]"]
    if kind == "stmatrix":
        operands.reverse()
    body = f"""
        mov.u32 %r9, buffer; and.b32 %r6, %r0, 7; mad.lo.u32 %r5, %r6, {stride}, %r9;
        {kind}.sync.aligned.m8n8.x4.shared.b16 {operands[0]}, {operands[1]};
    """
    found = counted(body, threads=32).shared[kind]
    assert (found.instructions, found.conflicts) == (1, conflicts)


def test_bytes_of_plain_accesses_and_cp_async():
    body = """
        mul.wide.u32 %rd1, %r0, 16; add.s64 %rd1, %rd0, %rd1;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]; st.global.b16 [%rd1], %rs1;
        mov.u32 %r9, buffer; mad.lo.u32 %r5, %r0, 16, %r9;
        cp.async.cg.shared.global [%r5], [%rd1], 16, 12;
        cp.async.commit_group; cp.async.wait_group 0;
    """
    found = counted(body)
    assert (found.bytes.loaded, found.bytes.stored) == (128 * 16, 128 * 2)
    assert found.bytes.cp_async == 128 * 12
    waits = found.waits["cp.async group"]
    assert (waits.executed, waits.blocked) == (4, 4) and waits.cycles >= 4 * clock.COPY_LATENCY


BULK_LOAD = """
    mov.u32 %r9, buffer; setp.ne.u32 %p1, %r0, 0; @%p1 bra SYNC;
    mbarrier.init.shared.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
    SYNC: bar.sync 0; @%p1 bra WAIT;
    mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r9], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9+128], [%rd0], 256, [%r9];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra WAIT;
"""


def test_a_bulk_load_and_those_who_wait_for_it():
    found = profiled(BULK_LOAD)
    assert set(found.counters) == {"load", "other"}
    load, other = found.counters["load"], found.counters["other"]
    assert (load.warps, other.warps) == (1, 3)
    assert (load.bytes.bulk_loaded, load.bytes.bulk_read) == (256, 256)
    assert (load.waits["mbarrier"].executed, other.waits["mbarrier"].executed) == (1, 3)
    assert other.waits["mbarrier"].blocked == 3
    assert other.waits["mbarrier"].cycles > 3 * clock.COPY_LATENCY
    assert found.longest_chain == 2  # the barrier of all threads, then the load


def test_a_wait_that_has_to_be_repeated_counts_once():
    assert profiled(BULK_LOAD).total.instructions["sync"] == 1 + 1 + 4 + 1 + 4


@pytest.mark.parametrize("warps", [2, 5])
def test_the_longest_chain_of_waits(warps):
    """Warp i waits for warp i - 1 at barrier i; the last instructions of all are not in it."""
    body = "shr.u32 %r1, %r0, 5;\n"
    for i in range(warps):
        body += f"setp.ne.u32 %p1, %r1, {i}; @%p1 bra NOT{i};\n"
        body += f"bar.sync {i}, 64;\n" if i else ""
        body += f"bar.arrive {i + 1}, 64;\n" if i + 1 < warps else ""
        body += f"NOT{i}:\n"
    found = profiled(body, 32 * warps)
    assert found.longest_chain == warps - 1
    assert found.total.waits["named barrier"].executed == warps - 1


def test_a_warp_does_not_wait_for_itself():
    body = """
        mov.u32 %r9, buffer; mbarrier.init.shared.b64 [%r9], 32;
        mbarrier.arrive.shared.b64 %rd1, [%r9];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra WAIT;
    """
    found = profiled(body, 32)
    assert found.longest_chain == 0
    assert found.total.waits["mbarrier"].blocked == 0


def test_other_schedules_than_the_eager_one_are_refused():
    for wrong in ({"schedule": "random"}, {"schedule": "late"}, {"checks": ("late",)}):
        with pytest.raises(ValueError, match='a profile needs schedule="eager"'):
            Options(profile=Profile(), **wrong)
    assert Options(profile=Profile(), schedule="eager", checks=("late",)).profile is not None


@pytest.mark.parametrize("original", INSTRUMENTS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_an_instrument_is_called_as_its_original_is(original):
    parameters = [
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (original, INSTRUMENTS[original])
    ]
    assert parameters[0] == parameters[1]
