"""`python -m fa3 inspect`."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fa3.inspect import cli
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import Quantised, Signature

ROOT = Path(__file__).resolve().parents[2]
MULTIPLE = "expected a multiple of 8 from 8 to 256 for torch.bfloat16"


@pytest.fixture
def call(device, capsys):
    """Runs the command here; (exit status, standard output, standard error).

    `device` installs the emulator first, so that compiled kernels are shared with its tests.
    """

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["inspect", *arguments])
        return status, *capsys.readouterr()

    return run


def test_it_prints_what_the_call_would_run(call):
    run = "--run", "--seqlen-q", "100", "--seqlen-k", "300"
    status, out, err = call("--head-dim", "64", "--dtype", "bf16", "--causal", *run)
    assert status == 0
    assert err == "compiling, unless the cache has the kernel\nemulated 1 of 1 CTAs\n"
    out, _, table = out.partition("run on the emulator: ")
    _check_counters(table)
    lines = {line[:18].strip(): line[18:] for line in out.splitlines() if line[:1] != " "}
    assert lines["call"] == "bf16, head dim 64, of v 64 (tiles), mask causal"
    assert lines["served by"] == "forward sm90, fa3.kernels.sm90.forward.operands_16bit:forward"
    names = ("tiles", "stages", "shared memory", "registers", "spills", "steady loop", "predicted")
    for name in names:
        assert name in lines, out
    assert "issue slots per exponential" in out
    assert "of 64x64x16" in out  # P V at head dim 64


def _check_counters(table: str) -> None:
    """Of one tile and three key blocks."""
    rows = {line[2:36].strip(): line[36:].split() for line in table.splitlines()}
    assert rows["warps of a CTA"] == ["12", "1", "3"]
    assert rows["MMA FLOPs"] == [f"{2 * 192 * 128 * (64 + 64) * 3:,}", "0", "0"]
    assert rows["bytes:   read from global memory"][1] == f"{(100 + 2 * 300) * 64 * 2:,}"
    assert "hand-overs in the longest chain of waits" in table


def test_json_and_dump_agree_with_each_other(call, tmp_path):
    arguments = "--json", "--run", "--seqlen-k", "130", "--dump", str(tmp_path / "d")
    status, out, err = call("--head-dim", "64", "--causal", *arguments)
    assert status == 0
    found = json.loads(out)
    assert found["run"]["counters"]["mma"]["flops"] == 2 * 192 * 128 * (64 + 64) * 3
    expected = {"dtype": "bf16", "head_dim": 64, "head_dim_v": 64, "mask": "causal"}
    assert found["signature"].items() >= expected.items()
    assert Signature(**found["signature"]) == Signature(**expected)
    assert 989 > found["prediction"]["tflops"] > 100  # TFLOPs/s; 989 is the dense peak
    assert sum(found["prediction"]["shared_memory"].values()) < found["prediction"]["cycles"]
    report = found["report"]
    assert report["loops"][0]["straight"]["per_exponential"] > 4
    files = {path.suffix: path for path in (tmp_path / "d").iterdir()}
    assert sorted(files) == [".cubin", ".ptx", ".sass"]
    assert all(f"wrote {path}" in err for path in files.values())
    assert ".target sm_90a" in files[".ptx"].read_text()
    assert files[".cubin"].read_bytes()[:4] == b"\x7fELF"
    assert files[".sass"].read_text().count("HGMMA") == report["mmas"]


@pytest.mark.parametrize(
    ("arguments", "quantised"),
    [
        (("--dtype", "e4m3"), Quantised("e4m3", "e4m3", "bf16", k_block=128, v_block=128)),
        (
            ("--dtype", "e4m3", "--scales", "block64"),
            Quantised("e4m3", "e4m3", "bf16", k_block=64, v_block=64),
        ),
        (("--dtype", "e4m3", "--scales", "head"), Quantised("e4m3", "e4m3", "bf16")),
        (("--dtype", "int8"), Quantised("int8", "e4m3", "bf16", k_block=128, v_block=128)),
    ],
)
def test_one_byte_inputs_have_scales_of_a_kind(arguments, quantised):
    args = cli.arguments(["inspect", "--head-dim", "128", *arguments])
    expected = Signature(quantised.k, 128, 128, "full", quantised)
    assert cli.signature_of(args) == expected


def test_softcap_and_sinks(call, tmp_path):
    options = "--softcap", "20", "--sinks"
    status, out, _ = call("--head-dim", "64", *options, "--run", "--dump", str(tmp_path))
    assert status == 0
    assert "mask full, softcap, sinks" in out
    assert {path.stem.split("full_")[1] for path in tmp_path.iterdir()} == {"softcap_sinks"}


def test_a_backward_pass(call, tmp_path):
    status, out, _ = call("--backward", "--head-dim", "64", "--causal", "--dump", str(tmp_path))
    assert status == 0
    lines = {line[:18].strip(): line[18:] for line in out.splitlines() if line[:1] != " "}
    assert lines["call"] == "bf16, head dim 64, of v 64 (tiles), mask causal"
    assert lines["served by"] == "backward sm90, fa3.kernels.sm90.backward.kernel:BackwardSm90"
    assert lines["stages"] == "2 of Q and of dO"
    assert re.search(r"floors .* sums in L2 \d+", out)
    beside = [line for line in out.splitlines() if line.startswith("beside")]
    assert ["finish" in beside[0], "prepare" in beside[1], len(beside)] == [True, True, 2]
    assert {x.stem for x in tmp_path.iterdir()} == {"backward_sm90_bf16_d64_dv64_causal"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ragged", "--run"), "--run is of sequences of one length: expected no --ragged"),
        (("--deterministic",), "--deterministic is of a backward pass: expected --backward, too"),
        (
            ("--backward", "--run", "--config", "tile_m=64"),
            "--run of a backward pass is of the tuning table: expected no --config",
        ),
        (("--backward", "--config", "tile_m=80"), "tile_m is 80, expected 64 or 128"),
        (("--backward", "--dtype", "e4m3"), "there is no backward pass for that yet"),
    ],
)
def test_what_has_no_backward_pass_is_refused(call, arguments, message):
    status, out, err = call("--head-dim", "64", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fa3 inspect: ") and message in err


def _floors(out) -> dict[str, int]:
    (line,) = re.findall(r"^  floors .* per step: (.*)$", out, re.MULTILINE)
    return {name: int(count) for name, count in re.findall(r"([a-z ]+) (\d+)", line)}


def test_what_bounds_a_kernel_on_ampere(call):
    """Cycles of a sub-partition, by hand: 64 queries of two CTAs' warps see 64 keys."""
    case = "--head-dim", "64", "--dtype", "fp16", "--causal", "--arch"
    status, out, _ = call(*case, "sm_80")
    assert status == 0
    floors = {name.strip(): cycles for name, cycles in _floors(out).items()}
    products = 2 * 32 * 64 * 64 // (16 * 8 * 16)  # of 32 rows of a warp
    assert floors["tensor cores"] == 8 * products
    assert floors["exponentials"] == 8 * 32 * 64 // 32
    read, copied = 2 * (32 + 2 * 64) * 64, 2 * 2 * 64 * 64 // 4
    assert 0 <= floors["shared memory"] - (read + copied) / 32 <= 16  # and a few words
    rate = int(re.search(r"^predicted +at most (\d+) TFLOPs/s of an A100", out, re.MULTILINE)[1])
    assert rate == round(4 * 108 * 2 * 16 * 8 * 16 / 8 * 1.41 / 1000)
    status, out, _ = call(*case, "sm_80", "--backward")
    assert status == 0
    of_both_sides = 5 * 64 * 128 * 64 // (16 * 8 * 16) // 4  # of a sub-partition's two warps
    assert _floors(out)["tensor cores"] == 8 * of_both_sides


def test_kernels_of_ragged_sequences(call, tmp_path):
    options = "--causal", "--ragged", "--backward", "--arch", "sm_80", "--dump", str(tmp_path)
    status, out, _ = call("--head-dim", "64", *options)
    assert status == 0
    assert "mask causal, ragged" in out and "Clear" in out
    assert {x.stem for x in tmp_path.iterdir()} == {"backward_sm80_bf16_d64_dv64_causal_ragged"}


def test_an_fp8_kernel_is_read_and_predicted(call):
    status, out, _ = call("--head-dim", "64", "--dtype", "e4m3", "--scales", "head")
    assert status == 0
    assert "one-byte inputs" in out and "transpose of V" in out
    rate = int(re.search(r"^predicted +(\d+) TFLOPs/s", out, re.MULTILINE)[1])
    assert 1979 > rate > 100  # 1979 is the dense peak


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("64", "--causal", "--page-size", "48"),
            ["mask causal, ragged, pages of 16", "32768 bytes"],
        ),
        (("128", "--splits", "3"), ["mask full, split", "90112 bytes", "bound by memory"]),
    ],
)
def test_kernels_of_caches(call, arguments, words):
    """A block of keys is K and V, of 128 keys by 64 + 64 channels, of 176 by 128 + 128."""
    status, out, _ = call("--head-dim", *arguments)
    assert status == 0
    for word in (*words, "cycles to\n"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--splits", "0"), "--splits is 0, expected at least 1"),
        (("--page-size", "-8"), "--page-size is -8, expected at least 0"),
        (("--splits", "2", "--run"), "--run goes with none of --splits, --page-size"),
        (("--page-size", "16", "--backward"), "--backward goes with none of --splits"),
        (("--cache-dtype", "e4m3", "--dtype", "int8"), "k has dtype torch.float8_e4m3fn but q has"),
    ],
)
def test_what_goes_with_no_cache_is_refused(call, arguments, message):
    status, out, err = call("--head-dim", "64", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fa3 inspect: ") and message in err


def test_another_config_than_the_tables(call):
    changes = "--config", "tile_n=112", "num_stages=2", "schedule=static"
    status, out, _ = call("--head-dim", "64", "--causal", *changes)
    assert status == 0
    assert "\nschedule          static: " in out
    assert "x 112 key rows" in out and "2 of K and of V" in out


@pytest.mark.parametrize("change", ["tile=112", "tile_n", "tile_n=wide", "tile_n=-1", "o_space=1"])
def test_a_change_that_is_none_of_a_config_is_refused(call, change):
    status, out, err = call("--head-dim", "64", "--config", change)
    assert (status, out) == (2, "")
    assert err.startswith(f"fa3 inspect: --config {change}: expected NAME=NUMBER")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tile_n=512",), "tile_n=512: tile_n is 512, expected a multiple of 16 from 16 to 256"),
        (("tile_n=100",), "tile_n=100: tile_n is 100, expected a multiple of 16 from 16 to 256"),
        (("num_mma_warpgroups=5",), "num_mma_warpgroups is 5, expected 1, 2 or 3"),
        (("schedule=both",), "schedule is 'both', expected static, dynamic or None"),
        (("num_stages=0",), "num_stages is 0, expected at least 1"),
        (("o_slice=8",), "o_slice is 8, expected 0, as O of 16-bit inputs is not sliced"),
        (("tile_n=128", "num_stages=99"), "bytes of shared memory per CTA, the limit is 232448"),
        (("tile_n=48", "--dtype", "e4m3"), "tile_n is 48, expected a multiple of 32 from 32 to"),
        (("o_slice=24", "--dtype", "e4m3"), "o_slice is 24, expected one of [0, 8, 16, 32]"),
    ],
)
def test_a_config_that_no_kernel_can_have_is_refused(call, arguments, message):
    """Before anything is compiled."""
    status, out, err = call("--head-dim", "64", "--config", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fa3 inspect: --config ") and message in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no SIGPIPE")
def test_a_reader_that_goes_away_ends_it_quietly(device):
    command = [sys.executable, "-m", "fa3", "inspect", "--head-dim", "64", "--causal", "--json"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == -signal.SIGPIPE


def test_head_dims_are_rounded_up_to_tiles(device):
    args = cli.arguments(["inspect", "--head-dim", "40", "--head-dim-v", "104"])
    signature = cli.signature_of(args)
    assert (signature.head_dim, signature.head_dim_v) == (64, 128)


def test_gradients_in_one_order_are_another_kernel():
    args = cli.arguments(["inspect", "--head-dim", "96", "--backward", "--deterministic"])
    assert cli.signature_of(args) == BwdSignature("bf16", 96, 96, "full", deterministic=True)


@pytest.mark.parametrize(
    ("window", "mask"),
    [(("-1", "-1"), "full"), (("-1", "0"), "causal"), (("128", "0"), "local")],
)
def test_a_window_is_the_mask_that_the_call_gives_it(window, mask):
    args = cli.arguments(["inspect", "--head-dim", "64", "--window", *window])
    assert cli.signature_of(args).mask == mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--head-dim", "0"),
            f"q has head dim 0, {MULTIPLE}",
        ),
        (
            ("--head-dim", "264"),
            f"q has head dim 264, {MULTIPLE}",
        ),
        (
            ("--head-dim", "100"),
            f"q has head dim 100, {MULTIPLE}",
        ),
        (
            ("--head-dim", "64", "--head-dim-v", "4"),
            f"v has head dim 4, {MULTIPLE}",
        ),
        (
            ("--head-dim", "64", "--dtype", "float32"),
            "q has dtype torch.float32, expected torch.float16, torch.bfloat16, "
            "torch.float8_e4m3fn or torch.int8",
        ),
        (
            ("--head-dim", "64", "--dtype", "fp7"),
            "--dtype is 'fp7', expected one of bf16, fp16, e4m3, int8",
        ),
    ],
)
def test_bad_arguments_are_refused_in_the_words_of_the_call(call, arguments, message):
    assert call(*arguments) == (2, "", f"fa3 inspect: {message}\n")


def test_a_missing_disassembler_is_an_error_not_a_trace(call, monkeypatch, tmp_path):
    monkeypatch.setenv("NVDISASM", str(tmp_path / "none"))
    status, out, err = call("--head-dim", "64", "--causal")
    assert (status, out) == (1, "")
    assert "is no executable file" in err
