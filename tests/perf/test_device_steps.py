"""What the steps of perf.device make of what they find. None of these numbers was measured."""

import json
import re
import sys
from dataclasses import asdict

import pytest

from fa3.inspect.report import analyse
from fa3.kernels.config import SMEM_LIMIT, FwdConfig
from fa3.kernels.signature import Signature
from fa3.launch import dispatch, jit
from perf.cases import PASSES as CASE_PASSES
from perf.cases import flops
from perf.device import (
    accuracy,
    compiling,
    environment,
    first,
    probe,
    sanitize,
    serving,
    speed,
    steady,
    tune,
)
from perf.device.passes import PASSES
from perf.device.small import Small
from perf.results import ROOT, Machine, Row, read_csv, write_csv
from perf.variants import name_of

SYNTHETIC = Machine("SYNTHETIC GPU", "0.0", "0.0", "0.0", "synthetic", "1970-01-01T00:00Z")
FORWARD = PASSES[0]


def row(case, backend, tflops):
    return Row.of(case, backend, ms=flops(case) / tflops / 1e9, tflops=tflops, matmul_tflops=200.0)


def items_of_a_sweep(ours=110.0):
    items = [{"item": speed.MACHINE, "seconds": 0.1, **asdict(SYNTHETIC)}]
    for case in speed.cases():
        rows = [asdict(row(case, "fa3", ours)), asdict(row(case, "cudnn", 100.0))]
        items.append({"item": f"{case.of_pass} {case}", "rows": rows, "seconds": 1.0})
    return items


def test_sweep_leaves_a_file_and_its_summary(tmp_path):
    good, text = speed.summarise_rest(items_of_a_sweep(), tmp_path)
    line = "{}: geomean 1.10 worst 1.10 over 36 rows on SYNTHETIC GPU, 1970-01-01"
    assert (good, text) == (True, "\n".join(map(line.format, CASE_PASSES)))
    measured = read_csv(tmp_path / speed.CSV)
    assert len(measured) == 288
    assert {machine for _, machine in measured} == {SYNTHETIC}


def test_sweep_with_a_case_that_broke_its_process(tmp_path):
    items = items_of_a_sweep()
    items[5] = {"item": items[5]["item"], "error": "its process ended: nothing for 90 s"}
    good, text = speed.summarise_rest(items, tmp_path)
    assert not good
    assert "over 35 of 36 rows" in text
    assert "fa3: its process ended" in text


def test_serving_leaves_a_file_and_a_line_per_case(tmp_path, plain_torch):
    """A small case as the step measures it, under its name; the clock is a stand-in."""
    items = [{"item": speed.MACHINE, "seconds": 0.1, **asdict(SYNTHETIC)}]
    small = serving.serving.Step("decode", "bf16", batch=2, keys=40, group=2, page_size=16)
    clock = {"sample": lambda call, n: [2.0] * n, "device": "cpu", "copied": 1000}
    rows = serving.measured(small, **clock)["rows"]
    assert [row["backend"] for row in rows] == ["fa3", "fa3-cpp", "sdpa"]
    assert rows[0]["us"] == 2000 and not rows[0]["note"]
    for case in serving.cases():
        named = [row | _facts(case) for row in rows]
        items.append({"item": str(case), "rows": named, "seconds": 1.0})
    json.dumps(items)  # which a log does
    good, text = serving.summarise(items, tmp_path)
    assert good and len(text.splitlines()) == len(serving.cases()) == 10
    assert text.startswith(
        "decode, bf16, batch 1, 131072 keys, group 8, pages of 64: fa3 2000.0 us"
    )
    assert len(read_csv(tmp_path / serving.CSV, serving.serving.Step)) == 30
    assert not serving.summarise(items[:-1], tmp_path)[0]


def _facts(case) -> dict:
    names = "kind", "dtype", "batch", "keys", "group", "page_size"
    return {name: getattr(case, name) for name in names}


def test_what_decides_is_swept_first_and_the_rest_adds_to_it(tmp_path):
    first = [f"{case.of_pass} {case}" for case in speed.first_cases()]
    assert len(first) == 54
    machine, *items = items_of_a_sweep()
    of_first = [machine, *(item for item in items if item["item"] in first)]
    others = [machine, *(item for item in items if item["item"] not in first)]
    assert speed.summarise(of_first, tmp_path)[0]
    assert len(read_csv(tmp_path / speed.CSV)) == 2 * 54
    assert not speed.summarise_rest(others, tmp_path)[0]
    (tmp_path / "sweep.jsonl").write_text("\n".join(map(json.dumps, of_first)))
    assert speed.summarise_rest(others, tmp_path)[0]
    assert len(read_csv(tmp_path / speed.CSV)) == 288


def test_tuning_begins_where_the_sweep_is_furthest_behind(tmp_path):
    rows = []
    for case in (case for case in speed.cases() if case.dtype == "bf16"):
        slow = (case.head_dim, case.causal, case.length) == (256, True, 512)
        slower = (case.head_dim, case.causal, case.length) == (128, False, 4096)
        rows += [row(case, "fa3", 50.0 if slower else 80.0 if slow else 110.0)]
        rows += [row(case, "cudnn", 100.0)]
    write_csv(tmp_path / "sweep.csv", rows, SYNTHETIC)
    signatures = FORWARD.tuned()
    order = tune.by_need(signatures, tmp_path / "sweep.csv")
    assert [(s.head_dim, s.mask) for s in order[:2]] == [(128, "full"), (256, "causal")]
    assert sorted(map(str, order)) == sorted(map(str, signatures))
    assert tune.by_need(signatures, tmp_path / "none.csv") == signatures


@pytest.mark.parametrize(
    ("row", "signature"),
    [
        pytest.param(row, signature, id=name_of(signature))
        for row in PASSES
        for signature in row.tuned()
    ],
)
def test_candidates_fit(row, signature):
    candidates = row.candidates(signature)
    assert candidates[0] == row.config(signature)
    assert len(candidates) == len(set(candidates)) > 1
    assert all(config.smem_bytes(signature) <= SMEM_LIMIT for config in candidates)


def test_winners_are_rows_of_the_table(tmp_path):
    best, shipped = FwdConfig(tile_n=160, num_stages=3), FwdConfig(tile_n=128)
    assert eval(tune.as_code(best)) == best
    assert tune.as_code(shipped) == "FwdConfig(tile_n=128)"
    timed = {
        "item": "forward bf16 128 full times",
        "dims": [128, 128],
        "mask": "full",
        "shipped": tune.as_code(shipped),
        "tflops": {tune.as_code(best): 700.4, tune.as_code(shipped): 650.0},
    }
    out = {"item": "forward bf16 128 full FwdConfig(tile_n=192)", "error": "ValueError: wrong"}
    good, text = tune.summarise([out, timed], tmp_path)
    assert good
    assert text.splitlines() == [
        "1 kernels, 1 candidates, 1 of them out",
        '(128, 128): {"full": FwdConfig(tile_n=160, num_stages=3)},  # 700; '
        "shipped FwdConfig(tile_n=128): 650",
        "forward bf16 128 full FwdConfig(tile_n=192): ValueError: wrong",
    ]


def test_a_candidate_is_judged_by_its_output(device):
    signature = Signature("bf16", 64, 64, "causal")
    qkv = FORWARD.draw(signature, 1, 100, 1, device)
    assert tune.try_out(FORWARD, signature, FORWARD.config(signature), qkv) < 5e-3

    class Wrong:
        def bind(self, config, causal, *qkv):
            right = FORWARD.bind(config, causal, *qkv)
            return lambda: right() * 1.1

    with pytest.raises(ValueError, match="wrong output"):
        tune.try_out(Wrong(), signature, FORWARD.config(signature), qkv)


def test_a_candidate_of_one_byte_inputs_is_judged_by_what_its_codes_stand_for(device):
    (row,) = (row for row in PASSES if row.name == "forward fp8")
    signature = next(s for s in row.tuned() if (s.head_dim, s.mask) == (64, "causal"))
    inputs = row.draw(signature, 1, 150, 1, device)
    assert 1e-3 < tune.try_out(row, signature, row.config(signature), inputs) < 0.1


def test_what_calls_compile_is_known_without_a_gpu():
    target_of, found = dispatch.target_of, {}
    for row in PASSES:
        keys = compiling.keys_of(row)
        assert {row.key(s, row.config(s)) for s in row.signatures()} <= keys.keys()
        assert keys and all(arch == "sm_90a" for *_, arch in keys)
        found |= keys
    assert dispatch.target_of is target_of
    forward = [s for _, s, *_ in found if isinstance(s, Signature)]
    assert {s.page_rows for s in forward} >= {0, 16, 64, 128}
    assert any(s.is_split for s in forward) and any(s.is_ragged for s in forward)
    modules = {where.partition(":")[0] for where, *_ in found}
    assert modules >= {
        "fa3.kernels.sm90.forward.operands_16bit",
        "fa3.kernels.sm90.forward.operands_fp8",
        "fa3.kernels.sm90.backward.kernel",
        "fa3.kernels.sm80.forward.kernel",
        "fa3.kernels.sm80.backward.kernel",
        "fa3.kernels.simple.combine",
        "fa3.kernels.quantize",
    }


def test_the_first_minute_says_what_is_missing(tmp_path):
    items = [
        {"item": "forward", "case": "x", "off": 1e-3},
        {"item": "backward", "error": "ValueError: a row is off by 3 of its length"},
        {"item": "forward peer cudnn", "off": 1e-3},
        {"item": "forward peer fa4", "absent": "import flash_attn.cute: no such module"},
    ]
    good, text = first.summarise(items, tmp_path)
    assert not good
    assert text.splitlines() == [
        "1 of 2 passes are right; peers: forward peer cudnn",
        "backward: ValueError: a row is off by 3 of its length",
        "forward peer fa4: import flash_attn.cute: no such module",
    ]
    assert first.summarise(items[:1], tmp_path)[0]
    assert not first.summarise([], tmp_path)[0]


def test_every_pass_names_tests_that_there_are():
    for row in PASSES:
        assert row.tests and all((ROOT / test).exists() for test in row.tests)


class Forgetful:
    """A kernel whose second call gives another last bit."""

    def __init__(self):
        self.calls = 0

    def call(self, case, inputs):
        self.calls += 1
        out = inputs[0].clone()
        if self.calls == 2:
            out.view(-1)[0] += 2**-7
        return {"out": out}


def test_repeated_calls_are_compared_bit_by_bit(tmp_path):
    case = Small("bf16", 64, 64, 8, 8)
    found = steady.repeat_one(Forgetful(), case, "cpu", 5)
    assert found == {"runs": 5, "different": 1}
    good, text = steady.summarise_repeat([{"item": "x", **found}], tmp_path)
    assert not good and "1 of 5 runs differ" in text
    assert steady.summarise_repeat([{"item": "x", "runs": 5, "different": 0}], tmp_path)[0]


@pytest.mark.parametrize(
    ("extra", "outside", "finite", "good"),
    [
        (0, 0, True, True),
        (3 << 20, 0, True, False),
        (0, 3 << 20, True, False),
        (0, 0, False, False),
    ],
)
def test_memory_beside_the_outputs(extra, outside, finite, good, tmp_path):
    item = {
        "item": "forward 65536",
        "output_bytes": 16 << 20,
        "extra_bytes": extra,
        "outside_torch_bytes": outside,
        "finite": finite,
    }
    assert steady.summarise_memory([item], tmp_path)[0] == good


MEMCHECK = "========= COMPUTE-SANITIZER\nall calls made\n========= ERROR SUMMARY: {} errors"
RACECHECK = """========= Error: Race reported between Write access
=========     at kernel+0x1
all calls made
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)"""


@pytest.mark.parametrize(
    ("output", "errors", "detail"),
    [
        (MEMCHECK.format(0), 0, ""),
        (MEMCHECK.format(12), 12, ""),
        (RACECHECK, 3, "2 errors, 1 warning"),
    ],
)
def test_sanitizer_counts(output, errors, detail, tmp_path):
    command = [sys.executable, "-c", f"print({output!r})"]
    found = sanitize.check(command, tmp_path / "output.txt")
    assert (found["errors"], found["detail"]) == (errors, detail)
    assert (tmp_path / "output.txt").read_text().strip() == output.strip()
    assert sanitize.summarise([{"item": "x", **found}], tmp_path)[0] == (errors == 0)


@pytest.mark.parametrize("output", ["Device not supported", "========= ERROR SUMMARY: 0 errors"])
def test_a_sanitizer_that_saw_no_kernel_proves_nothing(output, tmp_path):
    command = [sys.executable, "-c", f"print({output!r})"]
    with pytest.raises(RuntimeError, match="no result"):
        sanitize.check(command, tmp_path / "output.txt")


def test_summaries_name_what_failed(tmp_path):
    failed = {"item": "broken one", "error": "RuntimeError: why"}
    for summarise in (
        accuracy.summarise_values,
        environment.summarise_ceilings,
        serving.summarise,
        first.summarise,
        compiling.summarise_build,
        compiling.summarise_first_calls,
        sanitize.summarise,
        steady.summarise_memory,
        steady.summarise_repeat,
    ):
        good, text = summarise([failed], tmp_path)
        assert not good and "RuntimeError: why" in text, summarise


@pytest.mark.parametrize("kind", ["none", "ex2"])
def test_a_product_is_probed(kind, device):
    """On the emulator, whose cycles mean nothing."""
    found = probe.product(kind, dispatch.target_of(device).kind, device, 8)
    assert found["step_cycles"] > 0
    assert (found["per_cycle"] > 0) == (kind != "none")


@pytest.mark.parametrize("way", probe.WAYS)
def test_sums_are_probed_and_right(way, device):
    assert probe.sums(way, dispatch.target_of(device).kind, device, 3, 2)["bytes_per_cycle"] > 0


def test_what_the_probe_says(tmp_path):
    """A step of 256 cycles takes 320 beside half an instruction a cycle of two registers."""
    alone = {"item": "product beside none", "step_cycles": 256.0, "per_cycle": 0.0}
    beside = {"item": "product beside mul", "step_cycles": 320.0, "per_cycle": 0.5}
    fast = {"item": "sums by bulk", "bytes_per_cycle": 20.0}
    good, text = probe.summarise([alone, beside, fast], tmp_path)
    assert not good  # others are missing
    assert "0.20 lost per register read" in text and "bulk: 20.0 bytes" in text
    assert probe.steal_of("mul", 256.0, beside) == 64 / 320


def test_each_neighbour_is_what_its_name_says():
    """In the loop of its machine code."""
    opcode = {"fma": "FFMA", "mul": "FMUL", "ex2": "MUFU", "max": "FMNMX", "lds": "LDS"}
    for kind in ("ex2", "max"):
        signature = probe.ProbeSignature(kind)
        cubin = jit.artifacts(f"{probe.MODULE}:Product", signature, None).cubin
        text = analyse(cubin).program.text
        assert len(re.findall(rf"\b{opcode[kind]}\b", text)) >= probe.BATCH
