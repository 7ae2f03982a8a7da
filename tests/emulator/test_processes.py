"""Clusters in several processes: nothing but the time may tell."""

import multiprocessing
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch

from fa3.emulator.errors import EmulatorError, KernelError, OutOfBounds, Race, Runaway
from fa3.emulator.execution import processes

from ..forks import in_child
from .ptx_runner import launch, prepared

# %r1 CTA, %rd1 the address of its thread's own word; a word more than there are threads
OWN = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r2, %r1, 128, %r0;
    mul.wide.u32 %rd1, %r2, 4;
    add.u64 %rd1, %rd1, %rd0;
"""
WRITE = "add.u32 %r3, %r2, 7; st.global.b32 [%rd1], %r3;"
CTAS = 7
BODIES = {
    "writes": OWN + WRITE,
    "reads what it writes": OWN + "ld.global.b32 %r3, [%rd1]; add.u32 %r3, %r3, 5;" + WRITE,
    "a branch that only the fifth CTA takes": OWN
    + "setp.ne.u32 %p1, %r1, 4; @%p1 bra END; add.u32 %r2, %r2, 1000;"
    + WRITE
    + "END:",
}
FAILURES = {
    "outside the tensor in the third CTA": (
        OWN + WRITE + "setp.eq.u32 %p1, %r1, 2; @%p1 ld.global.b32 %r4, [%rd1+4096];",
        OutOfBounds,
        r"CTA \(2, 0, 0\)",
    ),
    "two CTAs write one word": (
        OWN + "st.global.b32 [%rd1], %r2; st.global.b32 [%rd1+4], %r2;",
        Race,
        "cluster 1 of the grid writes global memory .* that cluster 0 accesses",
    ),
    "the sixth CTA reads what the second writes": (
        OWN
        + "setp.eq.u32 %p1, %r1, 5; @%p1 ld.global.b32 %r4, [%rd1+-2048];"
        + "setp.eq.u32 %p2, %r1, 1; @%p2 st.global.b32 [%rd1], %r2;",
        Race,
        "cluster 5 of the grid reads global memory .* that cluster 1 accesses",
    ),
    "an endless loop in the fourth CTA": (
        OWN + "setp.eq.u32 %p1, %r1, 3; AGAIN: @%p1 bra AGAIN;",
        Runaway,
        "more than 100000 instructions",
    ),
}


ARRAY = np.zeros(CTAS * 128 + 1, np.uint32)


def ran(body, count, checks=("global",)):
    """(memory after, statistics or error)"""
    ARRAY[:] = 0
    try:
        told = launch(body, ARRAY, grid=CTAS, checks=checks, processes=count)
    except KernelError as error:
        told = error
    assert not multiprocessing.active_children()
    return ARRAY.copy(), told


@pytest.mark.parametrize("checks", [(), ("global",)])
@pytest.mark.parametrize("name", BODIES)
def test_memory_and_statistics(name, checks):
    (alone, its), (spread, theirs) = (ran(BODIES[name], n, checks) for n in (1, 3))
    assert alone.any() and (alone == spread).all()
    assert its.pop("processes") == 1 and its.pop("serial") == "one process asked for"
    assert theirs.pop("processes") == 3 and theirs.pop("serial") == ""
    assert its == theirs and its["instructions"] > 0


@pytest.mark.parametrize("count", [1, 3])
def test_progress(count):
    told = []
    body = OWN + WRITE
    launch(body, ARRAY, grid=CTAS, processes=count, progress=lambda *told_: told.append(told_))
    assert told == [(i, CTAS) for i in range(1, CTAS + 1)]


@pytest.mark.parametrize("name", FAILURES)
def test_errors(name):
    body, kind, message = FAILURES[name]
    (alone, its), (spread, theirs) = (ran(body, n) for n in (1, 2))
    assert (alone == spread).all()
    assert type(its) is type(theirs) is kind
    assert str(its) == str(theirs) and its.source == theirs.source
    assert re.search(message, str(theirs))


@pytest.mark.parametrize(
    "body, grid, reason",
    [
        ("red.global.add.u32 [%rd0], 1;", 4, "atomics"),
        ("ld.acquire.gpu.global.u32 %r1, [%rd0];", 4, "atomics"),
        ("st.volatile.global.u32 [%rd0], 1;", 4, "atomics"),
        ("mov.u64 %rd1, %globaltimer;", 4, "clock"),
        (OWN + WRITE, 2, "few clusters"),
    ],
)
def test_when_clusters_stay_in_one_process(body, grid, reason):
    told = launch(body, np.zeros(512, np.uint32), grid=grid, processes=2)
    assert (told["processes"], told["serial"]) == (1, reason)


def test_what_is_short_stays_in_one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    given = OWN + WRITE, np.zeros(512, np.uint32)
    assert launch(*given, grid=4, processes=None)["serial"] == "short"
    monkeypatch.setattr(processes, "WORTH", 0)
    assert launch(*given, grid=4, processes=None)["processes"] == 2


def test_atomics_on_shared_memory_are_no_reason():
    told = launch("atom.shared.add.u32 %r9, [buffer], 1;", np.zeros(8), grid=4, processes=2)
    assert told["processes"] == 2


def test_a_child_that_is_killed(monkeypatch):
    monkeypatch.setattr(processes, "_report", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(EmulatorError, match="ended with signal 9: out of memory"):
        ran(OWN + WRITE, 2)


def test_from_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(ran(OWN + WRITE, 2)))
    thread.start()
    thread.join()
    assert found[0][1]["processes"] == 2
    assert (found[0][0][:-1] == np.arange(CTAS * 128) + 7).all()


def test_an_interrupt_ends_the_children(monkeypatch):
    def interrupt(children, others):
        os.kill(os.getpid(), signal.SIGINT)
        yield from ()

    monkeypatch.setattr(processes, "_in_order", interrupt)
    # a shell lets what it runs in the background ignore interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ran(OWN + WRITE, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


def test_a_fork_while_another_thread_launches(emulator, compiled):
    """The child has a device of its own: it computes, and is done with nothing of the thread's."""
    a, b, c = torch.randn(3, 300)
    function = compiled("add", a, b, c)
    launching, forked = threading.Event(), threading.Event()

    def slow(ptx):
        launching.set()
        forked.wait()
        return ptx

    def work():
        with emulator.options(edit=slow):
            function(a, b, c)

    def question():
        out = torch.zeros(300)
        function(a, b, out)
        return torch.equal(out, a + b)

    thread = threading.Thread(target=work)
    thread.start()
    launching.wait()
    try:
        assert in_child(question)
    finally:
        forked.set()
        thread.join()
    assert torch.equal(c, a + b)


@pytest.mark.parametrize("schedule", ["eager", "random"])
def test_the_forward_over_several_heads(device, emulator, schedule):
    import fa3

    if device.type != "cpu":
        pytest.skip("this run is on a GPU")
    q, k, v = torch.randn(3, 1, 150, 3, 64).bfloat16()

    def run(count):
        with emulator.options(processes=count, schedule=schedule):
            # without a mask: the tiles of others are handed out by an atomic
            out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
        told = emulator.launches[-1]
        return out, lse, told["processes"], told["instructions"], told["segments"]

    alone, spread = run(1), run(2)
    assert torch.equal(alone[0], spread[0]) and torch.equal(alone[1], spread[1])
    assert alone[2] == 1 and spread[2] == 2
    assert alone[3:] == spread[3:]


def test_what_only_a_child_executed_counts_too():
    body = BODIES["a branch that only the fifth CTA takes"]
    alone, spread = (prepared(body, ARRAY, grid=CTAS, processes=n) for n in (1, 2))
    alone.run()
    spread.run()
    assert (
        alone.lowered.executed() == spread.lowered.executed() == set(range(len(alone.kernel.code)))
    )
