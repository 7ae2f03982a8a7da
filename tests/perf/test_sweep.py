"""The sweep's command line, its order of measuring, and that a wrong kernel gets no time."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from perf import check, sweep, timing
from perf.backends import BACKENDS, FA2_OWN, OURS, Absent, ampere, gradients, vllm
from perf.cases import BACKWARD, DTYPES, FORWARD, FORWARD_FP8, TRAINING, Case
from perf.progress import track
from perf.results import Machine

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("bf16", 64, True, length=96, batch=2, heads=3)
CASE_FP8 = Case("e4m3", 64, True, length=150, batch=2, heads=3)


def sdpa(case, q, k, v):
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def call():
        out = F.scaled_dot_product_attention(*heads_first, is_causal=case.causal)
        return out.transpose(1, 2)

    return call


def one_row_off(case, q, k, v):
    def call():
        out = sdpa(case, q, k, v)().contiguous()
        out[1, 5, 2] *= 1.1
        return out

    return call


def absent(case, q, k, v):
    raise Absent("not installed")


def broken(case, q, k, v):
    raise RuntimeError("no\nkernel")


def run(backends, case=CASE):
    """By a stand-in clock: every call takes 2 ms, so does the matrix product of 8e9 operations."""
    rows = sweep.run_case(
        case, backends, (lambda: None, 8e9), 3, lambda call, n: [2.0] * n, device="cpu"
    )
    return {row.backend: row for row in rows}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the sweep would run")
def test_without_a_gpu_it_says_so_and_does_nothing_else(tmp_path):
    command = [sys.executable, "-m", "perf.sweep", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "perf.sweep: there is no CUDA GPU here, so nothing was measured or written.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_writes_a_table_a_csv_file_and_a_chart(tmp_path, monkeypatch, capsys):
    """All but the measuring: the rows are those of the stand-in clock."""
    rows = list(run({"fa3": absent, "fa2": sdpa}).values())
    machine = Machine("SYNTHETIC GPU", "0.0", "0.0", "0.0", "synthetic", "1970-01-01T00:00Z")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep, "this_machine", lambda: machine)
    monkeypatch.setattr(sweep, "sweep", lambda options: iter([rows]))
    assert sweep.main(["--out", str(tmp_path / "out")]) == 0
    assert "SYNTHETIC GPU" in capsys.readouterr().out
    stem = tmp_path / "out" / "sweep-1970-01-01T0000Z"
    assert len(stem.with_suffix(".csv").read_text().splitlines()) == 3
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_without_any_time_fails(tmp_path, monkeypatch):
    machine = Machine("SYNTHETIC GPU", "0.0", "0.0", "0.0", "synthetic", "1970-01-01T00:00Z")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep, "this_machine", lambda: machine)
    monkeypatch.setattr(sweep, "sweep", lambda options: iter([list(run({"fa3": absent}).values())]))
    assert sweep.main(["--out", str(tmp_path)]) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]


@pytest.mark.parametrize(
    "arguments", [["--dtype", "fp7"], ["--backends", "mine"], ["--lengths", "0"], ["--rounds", "0"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_quick_takes_fewer_lengths_and_rounds():
    quick, plain = sweep.parse(["--quick"]), sweep.parse([])
    assert set(quick.lengths) < set(plain.lengths) and quick.rounds < plain.rounds


def test_a_wrong_kernel_gets_no_time():
    rows = run({"fa3": one_row_off, "fa2": sdpa})
    assert rows["fa3"].tflops is None and "wrong output" in rows["fa3"].note
    assert rows["fa2"].tflops is not None and rows["fa2"].note == ""


def test_a_backend_that_fails_leaves_its_reason():
    rows = run({"fa3": absent, "fa4": broken, "fa2": sdpa})
    assert rows["fa3"].note == "not installed"
    assert rows["fa4"].note == "RuntimeError: no kernel"
    assert rows["fa2"].tflops is not None


def test_rates():
    row = run({"fa2": sdpa})["fa2"]
    assert row.ms == 2.0
    assert row.tflops == pytest.approx(4 * 2 * 3 * 64 * 96 * 96 / 2 / 2e-3 / 1e12)
    assert row.matmul_tflops == pytest.approx(4.0)
    assert row.percent_of_matmul == pytest.approx(100 * row.tflops / 4.0)


@pytest.mark.parametrize("window", [(-1, -1), (9, 0), (4, 30)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_exact_output_is_torchs(causal, window):
    case = Case("bf16", 32, causal, length=50, batch=2, heads=2, window=window)
    torch.manual_seed(0)
    q, k, v = (torch.randn(case.shape) for _ in range(3))
    ahead = torch.arange(50) - torch.arange(50)[:, None]
    left, right = (1000 if bound < 0 else bound for bound in window)
    seen = (ahead >= -left) & (ahead <= (0 if causal else right))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), attn_mask=seen
    )
    out = check.exact(case, q, k, v)
    assert check.row_error(out, expected.transpose(1, 2).float()) < 1e-5


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("causal", [False, True])
def test_backends_that_run_here_are_right(backend, causal):
    case = Case("bf16", 64, causal, length=150, batch=1, heads=2)
    qkv = [torch.randn(case.shape).bfloat16() for _ in range(3)]
    _, error = sweep.admit(case, BACKENDS[FORWARD][backend], qkv, check.exact(case, *qkv))
    assert 0 < error < check.ROW_ERROR["bf16"]


def test_the_row_of_ampere_is_right_too(monkeypatch):
    """By the reference: the emulator is one GPU per process, tests/test_sm80.py has its kernels."""
    monkeypatch.setenv("FA3_CPU", "reference")
    for of_pass in ("", BACKWARD):
        case = Case("bf16", 64, True, 150, batch=1, heads=2, gradients=of_pass)
        qkv = [torch.randn(case.shape).bfloat16() for _ in range(3)]
        prepare = BACKENDS[case.of_pass][FA2_OWN]
        _, error = sweep.admit(case, prepare, qkv, sweep.exact(case, *qkv))
        assert 0 < error < check.ROW_ERROR["bf16"]


@pytest.mark.parametrize("of_pass", [BACKWARD, TRAINING])
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_gradients_of_backends_that_run_here_are_right(backend, of_pass):
    case = Case("bf16", 64, backend == "fa3", 150, batch=1, heads=2, gradients=of_pass)
    qkv = [torch.randn(case.shape).bfloat16() for _ in range(3)]
    call, error = sweep.admit(case, BACKENDS[of_pass][backend], qkv, sweep.exact(case, *qkv))
    assert 0 < error < check.GRADIENT_ERROR["bf16"]
    again = call()  # as the clock calls it, more than once
    assert [x.shape for x in again] == [case.shape] * 3


def test_exact_gradients_are_torchs():
    case = Case("bf16", 32, True, length=50, batch=2, heads=2, gradients=BACKWARD)
    q, k, v = (torch.randn(case.shape).double().requires_grad_() for _ in range(3))
    dout = gradients.upstream(q)
    expected = torch.autograd.grad(sdpa(case, q, k, v)(), (q, k, v), dout)
    found = check.exact_gradients(case, q, k, v, dout)
    assert check.gradient_error(found, [x.float() for x in expected]) < 1e-5


def test_wrong_gradients_get_no_time():
    def wrong(case, q, k, v):
        call = gradients.of(sdpa)(case, q, k, v)
        return lambda: [*call()[:2], torch.zeros_like(v)]

    case = Case("bf16", 64, True, length=96, batch=2, heads=3, gradients=BACKWARD)
    rows = run({"fa3": wrong, "fa2": gradients.of(sdpa), "fa3-cpp": absent}, case)
    assert rows["fa3"].tflops is None and "wrong gradients" in rows["fa3"].note
    assert rows["fa3-cpp"].note == "not installed"
    forward = 4 * 2 * 3 * 64 * 96 * 96 / 2
    assert rows["fa2"].tflops == pytest.approx(2.5 * forward / 2e-3 / 1e12)
    assert rows["fa2"].of_pass == BACKWARD and rows["fa2"].title.endswith("causal, backward")


def test_nan_gradients_are_an_error():
    exact = [torch.ones(1, 4, 1, 8)]
    wrong = [exact[0].clone()]
    wrong[0][0, 1] = float("nan")
    assert check.gradient_error(wrong, exact) == float("inf")


def test_the_kernels_of_ampere_are_chosen_for_one_call_only(monkeypatch):
    from fa3.launch import dispatch

    monkeypatch.setenv("FA3_ARCH", "sm_90a")
    plain, seen = dispatch.target_of, []
    monkeypatch.setattr(dispatch, "_gpu", lambda properties, arch: seen.append(arch))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
    with ampere.as_ampere():
        assert dispatch.target_of is not plain
        dispatch.target_of(torch.device("cuda", 7))
    assert seen == [ampere.ARCH]
    assert dispatch.target_of is plain and os.environ["FA3_ARCH"] == "sm_90a"


def fp8_inputs(case):
    torch.manual_seed(0)
    return [torch.randn(case.shape).to(torch.float8_e4m3fn) for _ in range(3)]


@pytest.mark.parametrize("backend", ["fa3", "fa3-unscaled", "fa3-bf16"])
def test_backends_of_fp8_are_compared_with_the_exact_result_of_the_same_numbers(backend):
    qkv = fp8_inputs(CASE_FP8)
    expected = check.exact(CASE_FP8, *qkv)
    _, error = sweep.admit(CASE_FP8, BACKENDS[FORWARD_FP8][backend], qkv, expected)
    assert 0 < error < check.ROW_ERROR["bf16" if backend == "fa3-bf16" else "e4m3"]


class Node:
    """A tensor of a stand-in for cuDNN's graph; its setters return it."""

    def __init__(self, **given):
        self.given = given

    def __getattr__(self, name):
        if not name.startswith("set_"):
            raise AttributeError(name)
        return lambda value: self.given.update({name: value}) or self


class Graph:
    """Does with the buffers what cuDNN documents for its FP8 attention."""

    def __init__(self, **types):
        self.types = types

    def tensor(self, **given):
        return Node(**given)

    def sdpa_fp8(self, **arguments):
        self.arguments, self.outputs = arguments, [Node() for _ in range(4)]
        return self.outputs

    def build(self, modes):
        self.modes = modes

    def get_workspace_size(self):
        return 0

    def execute(self, buffers, workspace):
        given, a = {}, self.arguments
        for name, node in a.items():
            if isinstance(node, Node):
                given[name] = buffers[node].float()
        views = [given[x].as_strided(a[x].given["dim"], a[x].given["stride"]) for x in "qkv"]
        q, k, v = (x * given[f"descale_{name}"] for x, name in zip(views, "qkv", strict=True))
        scores = q @ k.mT * a["attn_scale"]
        if a["use_causal_mask"]:
            scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
        p = (scores.softmax(-1) * given["scale_s"]).to(torch.float8_e4m3fn).float()
        o, _, *amaxes = self.outputs
        out = (p * given["descale_s"]) @ v * given["scale_o"]
        buffers[o].as_strided(o.given["set_dim"], o.given["set_stride"]).copy_(out)
        assert all(node in buffers for node in amaxes)


def test_cudnn_gets_its_inputs_by_heads_and_its_output_is_scaled_back(monkeypatch):
    """By a stand-in that computes what the documentation says; cuDNN itself was not here."""
    types = SimpleNamespace(FP8_E4M3="e4m3", FLOAT="fp32")
    modes = SimpleNamespace(A="a", FALLBACK="fallback")
    cudnn = SimpleNamespace(pygraph=Graph, data_type=types, heur_mode=modes)
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    qkv = fp8_inputs(CASE_FP8)
    expected = check.exact(CASE_FP8, *qkv)
    call, error = sweep.admit(CASE_FP8, BACKENDS[FORWARD_FP8]["cudnn"], qkv, expected)
    assert 0.01 < error < check.ROW_ERROR["e4m3"]
    assert call().values.dtype == torch.float8_e4m3fn


def test_vllms_operator_gets_its_37_arguments(monkeypatch):
    calls = []

    def operator(*arguments):
        calls.append(arguments)
        return (arguments[0],)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(vllm, "_load", lambda: operator)
    for case in (CASE, CASE_FP8):
        qkv = [torch.zeros(case.shape).to(DTYPES[case.dtype])] * 3
        out = BACKENDS[case.of_pass]["fa3-cpp"](case, *qkv)()
        assert out.shape == case.shape
    plain, fp8 = calls
    assert len(plain) == len(fp8) == 37
    assert plain[20:23] == (None,) * 3
    assert all(torch.equal(x, torch.ones(2, 3)) for x in fp8[20:23])


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress_goes_through_all_items(has_tqdm, monkeypatch, capsys):
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(track(["one", "two"], "case")) == ["one", "two"]
    assert "two" in capsys.readouterr().err


def test_the_matrix_product_counts_its_operations():
    for dtype in (torch.float32, torch.float8_e4m3fn):
        call, operations = timing.matmul_call(dtype, "cpu", size=16)
        assert call().shape == (16, 16) and operations == 2 * 16**3


@pytest.mark.parametrize(
    "answer, clocks",
    [
        ("echo 1980, 2619", {"sm_mhz": 1980, "memory_mhz": 2619}),
        ("echo [N/A], [N/A]", {}),
        ("exit 9", {}),
    ],
)
def test_clocks_are_read_under_load(answer, clocks, tmp_path, monkeypatch):
    """By a stand-in nvidia-smi, which takes a moment to answer."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nsleep 0.1\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    assert sweep.clocks_under_load(lambda: calls.append(1)) == clocks
    assert calls


def test_nan_is_an_error():
    expected = torch.ones(1, 4, 1, 8)
    out = expected.clone()
    out[0, 2, 0, 3] = float("nan")
    assert check.row_error(out, expected) == float("inf")


def test_rounds_are_interleaved_and_rotated():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}

    def sample(call, repeats):
        call()
        return [timing.ROUND_MS] * repeats

    times = timing.interleave(calls, 3, sample)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {len(samples) for samples in times.values()} == {9}


def test_every_backend_says_why_it_is_absent(monkeypatch):
    """Those of other packages; a plain machine has none of them."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delenv("FA3_CPP_LIBRARY", raising=False)
    for name in set(sys.modules) & {"flash_attn", "flash_attn_interface", "cudnn"}:
        monkeypatch.delitem(sys.modules, name)
    qkv = torch.zeros(3, *CASE.shape)
    for name, package in (("fa4", "flash_attn"), ("fa3-cpp", "flash_attn_interface")):
        with pytest.raises(Absent, match=package):
            BACKENDS[FORWARD][name](CASE, *qkv)
    for name, package in (("cudnn", "cudnn"), ("fa3-cpp", "flash_attn_interface")):
        with pytest.raises(Absent, match=package):
            BACKENDS[FORWARD_FP8][name](CASE_FP8, *qkv.to(torch.float8_e4m3fn))
    assert all(OURS in backends for backends in BACKENDS.values())
