"""fa3.distributed: attention over a sequence that is spread over processes."""

import multiprocessing
import warnings

import pytest
import torch

from fa3.distributed import merge, positions, ring_attention
from fa3.distributed.order import CHUNKS, blocks, chunks_of, num_steps
from perf.ring import Layer

from . import reference
from .accuracy import assert_accurate, assert_lse
from .conftest import HOPPER
from .ring_cases import CASES, PROCESSES, SHARDED, TIMEOUT, RingCase, run_process

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (3, 0), (2, 1), (0, 5), (-1, 2), (4, -1), (9, 7), (40, 1)]


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_cover_what_is_seen_once(order, window):
    for size, length in ((1, 4), (2, 4), (3, 5), (4, 2), (5, 1)):
        total = size * length * CHUNKS[order]
        rows = [positions(total, rank, size, order) for rank in range(size)]
        seen = torch.zeros(total, total, dtype=torch.int64)
        chunks = [chunks_of(order, rank, size) for rank in range(size)]
        steps = num_steps(order, size, length, window)
        for rank in range(size):
            for step in range(size):
                source = (rank - step) % size
                found = blocks(chunks[rank], chunks[source], length, window)
                assert step < steps or found == []
                for block in found:
                    q, k = rows[rank][slice(*block.q)], rows[source][slice(*block.k)]
                    visible = reference.visible(len(q), len(k), window=block.window)
                    seen[q[:, None], k] += visible
        assert torch.equal(seen, reference.visible(total, total, window=window).long())


def test_causal_zigzag_is_one_call_a_step_and_equal_work():
    size, length, window = 4, 8, (-1, 0)
    chunks = [chunks_of("zigzag", rank, size) for rank in range(size)]
    for step in range(size):
        work = set()
        for rank in range(size):
            (block,) = blocks(chunks[rank], chunks[rank - step], length, window)
            s_q, s_k = (x.end - x.start for x in (block.q, block.k))
            work.add(reference.visible(s_q, s_k, window=block.window).sum().item())
        assert len(work) == 1
    assert num_steps("contiguous", 8, 100, (100, 0)) == 2
    assert num_steps("contiguous", 8, 100, (101, 0)) == 3


def test_positions_of_packed_sequences():
    found = [positions(12, rank, 2, "zigzag", [0, 8, 8, 12]).tolist() for rank in range(2)]
    assert found == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    with pytest.raises(
        ValueError, match="sequence 1 has length 6, expected a multiple of 4: 2 ranks"
    ):
        positions(14, 0, 2, "zigzag", [0, 8, 14])
    with pytest.raises(ValueError, match="order is 'striped', expected 'zigzag' or 'contiguous'"):
        positions(14, 0, 2, "striped")


def test_merge_and_its_gradient():
    """Of attention over two parts of the keys, and of parts that see none."""
    q, k, v = (torch.randn(2, 10, 3, 16, requires_grad=True) for _ in range(3))
    empty = torch.zeros(2, 10, 3, 16), torch.full((2, 3, 10), -torch.inf)
    out, lse = reference.exact(q, k, v)
    parts = [reference.exact(q, k[:, s], v[:, s]) for s in (slice(0, 4), slice(4, 10))]
    merged = merge(*merge(*empty, *parts[0]), *parts[1])
    torch.testing.assert_close(merged[0], out)
    torch.testing.assert_close(merged[1], lse)
    slopes = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((out, lse), (q, k, v), slopes)
    found = torch.autograd.grad(merged, (q, k, v), slopes)
    torch.testing.assert_close(found, wanted)
    nothing = merge(*empty, *empty)
    assert not nothing[0].any()
    assert nothing[1].isneginf().all()
    assert merge(*empty, empty[0] * torch.nan, empty[1] + torch.nan)[0].isnan().all()


@pytest.fixture(scope="module")
def processes(tmp_path_factory, device):
    """What each of the processes found."""
    if HOPPER:
        pytest.skip("the processes are forked and emulate a GPU, which this one has in use")
    import torch.distributed.tensor.experimental  # before the fork: once for all

    folder = tmp_path_factory.mktemp("ring")
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the threads at a fork
        started = [
            context.Process(target=run_process, args=(r, str(folder))) for r in range(PROCESSES)
        ]
        for process in started:
            process.start()
    for process in started:
        process.join(TIMEOUT.total_seconds() * 2)
        if process.is_alive():
            process.kill()
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]
    errors = [error for _, error in found if error]
    assert errors == []
    return [results for results, _ in found]


@pytest.mark.parametrize("i", range(len(CASES)), ids=[repr(x) for x in CASES])
def test_equals_one_process(i, processes):
    case = CASES[i]
    expected = [
        _expected(case, attend) for attend in (reference.exact, reference.baseline_with_lse)
    ]
    for rank in range(case.size):
        found = dict(processes[rank][i])
        sent = found.pop("sent")
        assert list(found) == list(expected[0])
        for name, x in found.items():
            exact, baseline = (y[name] for y in expected)
            if name == "lse":
                assert_lse(name, x, exact)
            else:
                assert_accurate(name, x, exact.to(x.dtype), baseline)
        if case.window == (-1, -1) and not case.is_packed:  # as docs/torch.md says
            layer = Layer(sum(case.lengths), 4, 2, case.d, batch=2)
            assert sent == (layer.forward_bytes(case.size), layer.backward_bytes(case.size))
    assert case.size == PROCESSES or i not in processes[case.size]


def _expected(case: RingCase, attend) -> dict[str, torch.Tensor]:
    """Sequence by sequence, in one process."""
    *qkv, dout, sink, dlse = case.inputs()
    inputs = [x.requires_grad_() for x in (*qkv, sink)]
    options = {**case.mask, "softcap": case.softcap, "sink": sink if case.sink else None}
    if case.is_packed:
        parts = zip(*(x.split(case.lengths) for x in inputs[:3]), strict=True)
        results = [attend(*(x[None] for x in part), **options) for part in parts]
        out = torch.cat([x[0][0] for x in results])
        lse = torch.cat([x[1][0] for x in results], -1)
    else:
        out, lse = attend(*inputs[:3], **options)
    given = ((out, dout), (lse, dlse)) if case.with_lse else ((out, dout),)
    results, slopes = zip(*given, strict=True)
    gradients = torch.autograd.grad(results, inputs[: 3 + case.sink], slopes)
    names = ("dq", "dk", "dv", "dsink")
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | dict(zip(names, gradients, strict=False))


def test_context_parallel_of_torch(processes):
    """Its ring calls fa3 on each process: 4 steps forward and 4 back."""
    case = RingCase()
    expected = [
        _expected(case, attend) for attend in (reference.exact, reference.baseline_with_lse)
    ]
    for results in processes:
        found = results["torch"]
        for name in ("out", "dq", "dk", "dv"):
            x = found[name].transpose(1, 2)
            exact, baseline = (y[name] for y in expected)
            assert_accurate(name, x, exact.to(x.dtype), baseline)
        name = "_scaled_dot_product_flash_attention"
        assert found["report"] == {name: {"fa3": 4}, f"{name}_backward": {"fa3": 4}}


@pytest.mark.parametrize("i", range(len(SHARDED)), ids=[str(x) for x in SHARDED])
def test_sharded_tensors(i, processes):
    """DTensors: whole groups of heads, or parts of the batch, are attended where they are."""
    case = RingCase(sink=True)
    expected = [
        _expected(case, attend) for attend in (reference.exact, reference.baseline_with_lse)
    ]
    _, placements, out_placements = SHARDED[i]
    for results in processes:
        found = dict(results["sharded"][i])
        assert found.pop("sends") == (placements != out_placements)
        for name, x in found.items():
            exact, baseline = (y[name] for y in expected)
            assert_accurate(name, x, exact.to(x.dtype), baseline)


def _qkv():
    return [torch.randn(1, 8, 2, 16, dtype=torch.bfloat16) for _ in range(3)]


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="no process group: call .* or fa3.flash_attn_func"):
        ring_attention(*_qkv())


@pytest.fixture
def alone(tmp_path, plain_torch):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", world_size=1, rank=0)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "order is 'ring'", {"order": "ring"}),
        (ValueError, r"q has length 7, expected an even one", {"rows": 7}),
        (ValueError, r"learnable_sink has shape \(3,\)", {"learnable_sink": torch.zeros(3)}),
        (TypeError, "q has dtype torch.float32", {"dtype": torch.float32}),
        (ValueError, r"k has \(1, 6\) rows but q has \(1, 8\)", {"keys": 6}),
        (ValueError, "q has 4 dimensions", {"cu_seqlens": torch.tensor([0, 8])}),
        (TypeError, "window_size is 3", {"window_size": 3}),
    ],
)
def test_bad_input(error, message, change, alone):
    q, k, v = _qkv()
    rows, keys, dtype = (change.pop(x, None) for x in ("rows", "keys", "dtype"))
    q, k, v = (x[:, :rows].to(dtype or x.dtype) for x in (q, k, v))
    k, v = (x[:, :keys] for x in (k, v))
    with pytest.raises(error, match=message):
        ring_attention(q, k, v, **change)


def test_bad_input_of_packed_sequences(alone):
    q, k, v = (x[0] for x in _qkv())
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen is None"):
        ring_attention(q, k, v, cu_seqlens=cu_seqlens)
    with pytest.raises(NotImplementedError, match=r"window_size is \(3, -1\) with cu_seqlens"):
        ring_attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=8, window_size=(3, -1))
