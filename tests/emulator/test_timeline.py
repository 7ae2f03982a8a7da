"""Nominal times and timelines: what waits for what, and files of them."""

import json
import sys

import numpy as np
import pytest
import torch

from fa3.emulator import Profile
from fa3.emulator.errors import SetupError
from fa3.emulator.profiling import clock

from .ptx_runner import launch

BULK_LOADS = """
    mov.u32 %r9, buffer; setp.ne.u32 %p1, %r0, 0; @%p1 bra SYNC;
    mbarrier.init.shared.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
    SYNC: bar.sync 0; @%p1 bra WAIT;
    mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r9], 2048;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r9+128], [%rd0], 1024, [%r9];
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r9+1152], [%rd0+1024], 1024, [%r9];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra WAIT;
"""


def profiled(body, threads=128, **options):
    profile = Profile()
    launch(body, np.zeros(4096, np.uint32), threads, profile=profile, **options)
    return profile


@pytest.fixture
def loaded():
    return profiled(BULK_LOADS)


@pytest.fixture(scope="module")
def forward(device_of_forward):
    """The profile of two query tiles of a causal forward pass, two heads."""
    import fa3
    from fa3 import emulator

    q, k, v = (torch.randn(1, n, 1, 64, dtype=torch.bfloat16) for n in (200, 500, 500))
    with emulator.profile() as profile:
        fa3.flash_attn_func(q, k, v, causal=True)
    return profile


@pytest.fixture(scope="module")
def device_of_forward(emulator):
    with emulator.options(checks=()):
        yield


def of_kind(profile, kind, cta=0):
    events = [e for e in profile.launches[-1].events if e.kind == kind and e.cta == cta]
    return sorted(events, key=lambda e: e.start)


def test_loads_come_one_after_another_and_take_a_latency(loaded):
    first, second = of_kind(loaded, "load")
    duration = 1024 / clock.COPY_BYTES
    assert first.end - first.start == pytest.approx(duration + clock.COPY_LATENCY)
    assert second.end - first.end == pytest.approx(duration)
    assert first.warps == second.warps == (0,)


def test_who_waits_goes_on_when_the_last_load_has_arrived(loaded):
    arrival = of_kind(loaded, "load")[-1].end
    ends = [e.end for e in of_kind(loaded, "wait") if e.name == "mbarrier"]
    assert ends and set(ends) == {arrival}
    path = loaded.launches[0].critical_path
    assert path["load latency"] == clock.COPY_LATENCY
    assert sum(path.values()) == pytest.approx(loaded.launches[0].cycles)


def test_a_barrier_passes_on_the_latest_time():
    """Warp 0 computes before it arrives, warp 1 waits for it and warp 2 does not."""
    slow = "ex2.approx.ftz.f32 %f1, %f1;" * 50
    body = f"""
        setp.ge.u32 %p1, %r0, 32; @%p1 bra OTHERS;
        {slow} bar.arrive 1, 64; ret;
        OTHERS: setp.ge.u32 %p1, %r0, 64; @%p1 bra LAST;
        bar.sync 1, 64; ret;
        LAST:
    """
    found = profiled(body, 96).launches[0]
    (wait,) = (e for e in found.events if e.kind == "wait")
    assert wait.warps == (1,) and wait.name == "named barrier"
    assert wait.end - wait.start > 50 * 8 - 20
    (stretch,) = (e for e in found.events if e.kind == "exponentials")
    assert stretch.warps == (0,) and stretch.end + 1 == wait.end  # bar.arrive itself
    assert found.critical_path == {"instructions": found.cycles}


def test_bank_conflicts_take_time():
    def cycles(stride):
        access = f"mad.lo.u32 %r1, %r0, {stride}, buffer; ld.shared.b32 %r2, [%r1];"
        return profiled(access.replace("buffer", "%r9"), 32).launches[0].cycles

    assert cycles(128) - cycles(4) == 31


def test_the_tensor_cores_do_one_product_after_another(forward):
    products = of_kind(forward, "mma")
    assert all(a.end <= b.start for a, b in zip(products, products[1:], strict=False))
    flops = sum(c.flops for c in forward.launches[-1].warps)
    busy = sum(e.end - e.start for cta in (0, 1) for e in of_kind(forward, "mma", cta))
    assert busy == flops / clock.MMA_FLOPS[2]


def test_warpgroups_take_turns(forward):
    """Ping-pong: after their first Q K^T each, the warpgroups issue both products in turn."""
    products = [(e.warps[0] // 4, e.name.split(", A in ")[1]) for e in of_kind(forward, "mma", 1)]
    turn = [(i, a) for i in (1, 2, 3) for a in ("shared memory", "registers")]
    assert products[:3] == turn[::2]
    steady = products[3:-3]
    assert steady == turn * (len(steady) // 6) and len(steady) >= 12


def test_a_warp_does_one_thing_at_a_time(forward):
    for warps in ((4, 5, 6, 7), (8, 9, 10, 11)):
        own = [
            e for kind in ("exponentials", "instructions", "wait") for e in of_kind(forward, kind)
        ]
        own = sorted((e for e in own if e.warps == warps), key=lambda e: e.start)
        assert len(own) > 20
        assert all(a.end <= b.start for a, b in zip(own, own[1:], strict=False))


def test_a_trace_holds_all_events(forward, tmp_path):
    path = tmp_path / "trace.json"
    forward.write_trace(path, labels={"64x64x128, A in registers": "P V"})
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == {0, 1}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
    }
    names = set(threads.values())
    assert {"loads", "tensor cores", "warp 0 (load)", "warps 4-7 (mma)"} <= names
    assert sum(e["name"] == "P V" for e in spans) == len(
        [e for e in forward.launches[-1].events if e.name == "64x64x128, A in registers"]
    )
    for thread in threads:
        own = sorted((e["ts"], e["dur"]) for e in spans if (e["pid"], e["tid"]) == thread)
        ends = [start + duration for start, duration in own]
        assert all(end <= b[0] + 1e-9 for end, b in zip(ends, own[1:], strict=False))
    sources = {e["args"]["source"].split("/")[-1].split(":")[0] for e in spans}
    assert {"attend.py", "rings.py", "wgmma.py"} <= sources


def test_a_picture(forward, tmp_path):
    path = tmp_path / "cta.png"
    forward.write_png(path, cta=1, start=500, end=9000, title="causal")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"CTA 7 has no events; the grid is \(2, 1, 1\)"):
        forward.write_png(path, cta=7)


def test_a_picture_needs_matplotlib(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SetupError, match="pip install matplotlib"):
        loaded.write_png(tmp_path / "x.png")


def test_schedules_can_be_compared_inside_of_a_profile(emulator, compiled):
    a = torch.arange(128, dtype=torch.int32)

    def run():
        x = a.clone()
        compiled("reverse", x)(x)
        return [x]

    with emulator.profile() as profile:
        (result,) = emulator.compare_schedules(run, seeds=(0,), checks=())
        run()
    assert torch.equal(result, a.flip(0))
    assert len(profile.launches) == 1 and "events" not in repr(profile)


def test_an_empty_profile_says_so(tmp_path):
    with pytest.raises(ValueError, match="no launch yet"):
        Profile().write_trace(tmp_path / "x.json")
