"""A dynamic schedule: the bits of a static one, a counter that is 0 again, and one for whom."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fa3
from fa3 import ops
from fa3.kernels.config import FwdConfig
from fa3.kernels.signature import Signature
from fa3.launch import counters, dispatch, tuning

from .conftest import HOPPER
from .fp8_calls import E4M3, numbers

SEEDS = range(1)
LENGTHS = [0, 70, 70, 71, 200]  # as cu_seqlens


@pytest.fixture
def scheduled(monkeypatch):
    """Makes all calls have a schedule, and every counter that they get known."""
    forward, of = tuning.forward, counters.of
    taken = []

    def recorded(device):
        take = of(device)

        def taking():
            taken.append(take())
            return taken[-1]

        return taking

    def choose(schedule):
        def chosen(signature, *others):
            config = forward(signature, *others)
            is_own = config.is_dynamic(signature) == (schedule == "dynamic")
            return config if is_own else replace(config, schedule=schedule)

        monkeypatch.setattr(tuning, "forward", chosen)
        ops.plan_of.cache_clear()
        return taken

    monkeypatch.setattr(counters, "of", recorded)
    yield choose
    ops.plan_of.cache_clear()


def inputs(shape, device, dtype=torch.bfloat16):
    if dtype == E4M3:
        return [numbers(*shape, dtype=E4M3).to(device) for _ in range(3)]
    return [torch.randn(shape).to(dtype).to(device) for _ in range(3)]


def dense(device, margin, dtype=torch.bfloat16, **options):
    q, k, v = inputs((1, 140, 4, 128), device, dtype)
    return lambda: fa3.flash_attn_func(q, k, v, **options, sm_margin=margin, return_attn_probs=True)


def ragged(device, margin):
    q, k, v = inputs((LENGTHS[-1], 2, 128), device)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    options = {"window_size": (90, 20), "sm_margin": margin, "return_attn_probs": True}
    return lambda: fa3.flash_attn_varlen_func(q, k, v, lengths, lengths, 129, 129, **options)


CALLS = {  # more tiles than CTAs, and in one of them more than the board has slots
    "causal": lambda *x: dense(*x, causal=True),
    "full": dense,
    "e4m3": lambda *x: dense(*x, E4M3, causal=True),
    "ragged": ragged,
}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_a_static_schedule(name, device, scheduled):
    call = CALLS[name](device, dispatch.target_of(device).num_sms - 2)
    assert scheduled("static") == []
    wanted = call()
    taken = scheduled("dynamic")
    if HOPPER:
        found = call()
    else:
        from fa3 import emulator

        found = emulator.compare_schedules(call, SEEDS, checks=emulator.ALL_CHECKS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert (name == "ragged") == (not taken)
    assert all(counter.item() == 0 for counter in taken)


def test_which_schedule_a_signature_gets():
    kinds = [("full", False), ("causal", False), ("local", False), ("full", True)]
    signatures = [Signature("bf16", 64, 64, mask, is_ragged=ragged) for mask, ragged in kinds]
    config = FwdConfig(tile_n=128)
    assert [config.is_dynamic(s) for s in signatures] == [False, True, True, True]
    assert all(replace(config, schedule="dynamic").is_dynamic(s) for s in signatures)
    assert not any(replace(config, schedule="static").is_dynamic(s) for s in signatures)
    gathered = Signature("bf16", 64, 64, "causal", is_ragged=True, page_rows=1)
    assert gathered.gathers and not config.is_dynamic(gathered)
    with pytest.raises(ValueError, match="schedule is 'dynamic', .* where rows are gathered"):
        replace(config, schedule="dynamic").check(gathered)
    with pytest.raises(ValueError, match="schedule is 'both', expected static, dynamic or None"):
        replace(config, schedule="both").check(signatures[0])


# Mutants of what tells a CTA its tiles


@pytest.mark.skipif(HOPPER, reason="mutants run on the emulator")
def test_a_missing_or_wrong_wait_is_caught(device):
    from fa3 import emulator
    from fa3.emulator.mutation import Judge

    margin = dispatch.target_of(device).num_sms - 1
    judge = Judge(CALLS["causal"](device, margin), SEEDS)
    own = [m for m in judge.mutants if m.place[0].endswith("tile_queue.py")]
    own = [m for m in own if m.kind in ("wait", "arrive")]
    assert [m.kind for m in own].count("wait") == 2
    assert [m.kind for m in own].count("arrive") == 2
    assert all(judge.verdict(m) for m in own)

    def wrong_phase(ptx: str) -> str:
        lines = ptx.split("\n")
        wait = next(m.line for m in own if m.kind == "wait")
        assert lines[wait].count("], 0,") == 1
        lines[wait] = lines[wait].replace("], 0,", "], 1,")
        return "\n".join(lines)

    with emulator.options(edit=wrong_phase, checks=("race",)):
        with pytest.raises((emulator.Race, emulator.Deadlock), match="tile_queue.py:.* in read"):
            CALLS["causal"](device, margin)()


@pytest.mark.skipif(HOPPER, reason="a GPU has no check for races of CTAs")
def test_ctas_with_the_same_tile_are_found(device):
    """The counter orders nothing else: writes of two CTAs to one row are a race."""
    from fa3 import emulator

    call = CALLS["causal"](device, dispatch.target_of(device).num_sms - 2)

    def without_counting(ptx: str) -> str:
        """Every CTA finds the counter at its first tile, once, and then beyond the last one."""
        assert ptx.count("atom.relaxed.gpu.global.inc.u32") == 1
        return ptx.replace("%ctaid.x", "0")

    with emulator.options(edit=without_counting, checks=("race", "global")):
        with pytest.raises(emulator.Race, match="global memory"):
            call()


# Counters


class Cuda:
    """The state of a CUDA context that the pool asks for."""

    def __init__(self):
        self.current, self.capturing, self.handle = 0, False, 5

    @property
    def runtime(self) -> counters.Runtime:
        return counters.Runtime(
            lambda: self.current, lambda: self.capturing, lambda index: self.handle
        )


@pytest.fixture
def cuda():
    return Cuda()


@pytest.fixture
def pool(cuda, monkeypatch):
    """On CPU memory."""
    device = SimpleNamespace(index=0)
    monkeypatch.setattr(counters, "IN_GRAPHS", 3)
    found = counters.Pool(device, cuda.runtime)
    found._device = torch.device("cpu")
    return found


def test_a_stream_has_one_counter(pool, cuda):
    first = pool.take()
    assert (first.dtype, first.shape, first.item()) == (torch.int32, (1,), 0)
    assert pool.take() is first
    cuda.handle = 6
    other = pool.take()
    assert other.data_ptr() != first.data_ptr()
    cuda.handle = 5
    assert pool.take() is first


def test_a_captured_launch_has_a_counter_of_its_own(pool, cuda):
    """The last ones, beyond the chunk, are zeroed by the graph: memory that is new each time."""
    eager = pool.take()
    cuda.capturing = True
    found = [pool.take() for _ in range(5)]
    assert len({x.data_ptr() for x in (eager, *found)}) == 6
    assert [x.untyped_storage().nbytes() for x in found] == [12, 12, 12, 4, 4]
    assert all((x.dtype, x.shape, x.item()) == (torch.int32, (1,), 0) for x in found)
    cuda.capturing = False
    assert pool.take() is eager


def test_a_capture_ahead_of_the_first_call_allocates_within_the_graph(pool, cuda):
    cuda.capturing = True
    assert pool.take().untyped_storage().nbytes() == 4
    assert pool._chunk is None


def test_another_current_device(pool, cuda, monkeypatch):
    """The stream that counts is that of the tensors' device."""

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            cuda.current, self.index = self.index, cuda.current

        def __exit__(self, *_):
            cuda.current = self.index

    monkeypatch.setattr(torch.cuda, "device", Guard)
    wanted, cuda.current = pool.take(), 1
    assert pool.take() is wanted
    assert cuda.current == 1


def test_an_emulated_launch_that_fails_leaves_no_counter_behind():
    take = counters.of(torch.device("cpu"))
    take().fill_(3)
    assert take().item() == 0
