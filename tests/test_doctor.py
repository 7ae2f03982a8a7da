"""`python -m fa3 doctor`: what it says of machines that are not this one."""

import json
from dataclasses import replace

import pytest

from fa3 import doctor
from fa3.doctor import Facts, Gpu
from fa3.inspect import cli
from fa3.launch import jit, toolkit

H100, A100, T4 = Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA A100", (8, 0)), Gpu("NVIDIA T4", (7, 5))
HOPPER = Facts(
    system="Linux x86_64",
    python=(3, 12),
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    cudnn=91900,
    driver="580.65.06",
    driver_cuda=(13, 0),
    gpus=(H100,),
    gpu_error="",
    dsl="4.8.1",
    toolkits=(12, 13),
    tvm_ffi="0.1.15",
    c_compiler="cc",
    c_compiler_error="",
    disassembler="/usr/bin/nvdisasm",
    cache_folder="/caches/fa3",
    cache_error="",
    cache_entries=3,
    cache_bytes=4_500_000,
    peers={"flash-attn": "2.8.3"},
    variables={},
)


def texts(facts: Facts) -> dict[str, str]:
    return {x.name: x.text for x in doctor.findings(facts)}


def levels(facts: Facts) -> dict[str, str]:
    return {x.name: x.level for x in doctor.findings(facts)}


def test_a_hopper_gpu():
    status, (gpu, cpu) = doctor.outcome(HOPPER)
    assert status == 0
    assert gpu == "CUDA tensors: kernels, on NVIDIA H100"
    assert cpu.startswith("CPU tensors: plain torch; ")
    assert set(levels(HOPPER).values()) == {"ok"}
    found = texts(HOPPER)
    assert found["GPU 0"].splitlines() == [
        "NVIDIA H100, compute capability 9.0",
        "16-bit forward: forward sm90",
        "16-bit backward: backward sm90",
        "FP8 forward: FP8 forward sm90",
        "cache in pages: forward sm90",
    ]
    assert found["CuTe DSL"].endswith("libraries of CUDA 12, 13; compiles with those of 13")
    assert found["others"] == "flash-attn 2.8.3, cuDNN 91900 (torch's)"
    assert found["cache"] == "/caches/fa3: 3 kernels, 4.5 MB"


def test_an_ampere_gpu_says_what_it_lacks():
    facts = replace(HOPPER, gpus=(A100,))
    assert doctor.outcome(facts)[0] == 0
    lines = texts(facts)["GPU 0"].splitlines()
    assert lines[1] == "16-bit forward: forward sm80"
    assert lines[3].startswith("FP8 forward: no kernel: NVIDIA A100 has no kernel for FP8")


def test_a_gpu_without_kernels():
    facts = replace(HOPPER, gpus=(T4,))
    status, (gpu, _) = doctor.outcome(facts)
    assert (status, gpu) == (1, "CUDA tensors: none, no GPU here has a kernel")
    needs = "16-bit forward: no kernel: it needs compute capability 9.x, 8.x or one of 10.0"
    assert needs in texts(facts)["GPU 0"]
    assert levels(facts)["GPU 0"] == "bad"
    both = replace(HOPPER, gpus=(T4, H100))
    assert doctor.outcome(both) == (0, ["CUDA tensors: kernels, on NVIDIA H100", *_cpu(both)])


def test_a_gpu_newer_than_hopper():
    """It runs the kernels for 8.x; FP8 is refused as such, not for its compute capability."""
    facts = replace(HOPPER, gpus=(doctor.Gpu("NVIDIA B200", (10, 0)),))
    assert doctor.outcome(facts)[0] == 0
    lines = texts(facts)["GPU 0"].splitlines()
    assert lines[1:3] == ["16-bit forward: forward sm80", "16-bit backward: backward sm80"]
    assert lines[3].startswith("FP8 forward: no kernel: NVIDIA B200 has no kernel for FP8")


def _cpu(facts: Facts) -> list[str]:
    return doctor.outcome(facts)[1][1:]


def test_no_gpu():
    facts = replace(HOPPER, gpus=(), gpu_error="torch sees no GPU", driver_cuda=None, driver=None)
    status, (gpu, _) = doctor.outcome(facts)
    assert (status, gpu) == (1, "CUDA tensors: none, torch sees no GPU")
    assert levels(facts)["driver"] == levels(facts)["GPU"] == "note"
    assert texts(facts)["CuTe DSL"].endswith("compiles with those of 13")


@pytest.mark.parametrize(
    "change, level, text",
    [
        ({"driver_cuda": (12, 9)}, "ok", "compiles with those of 12"),
        ({"toolkits": (12,)}, "note", "pip install 'fa3[cu13]'"),
        ({"driver_cuda": (11, 8)}, "bad", "none of them runs with this driver"),
        ({"dsl": None}, "bad", "not installed"),
        ({"dsl": "4.9.0"}, "note", "the emulator works with 4.8.1 alone"),
    ],
)
def test_the_dsl_and_the_driver(change, level, text):
    facts = replace(HOPPER, **change)
    assert text in texts(facts)["CuTe DSL"]
    assert levels(facts)["CuTe DSL"] == level
    assert doctor.outcome(facts)[0] == (2 if level == "bad" else 0)


@pytest.mark.parametrize(
    "change, name, level, text",
    [
        ({"torch": "2.9.1"}, "torch", "bad", "expected 2.11 on"),
        ({"torch": "2.11.0a0+git"}, "torch", "ok", "2.11.0a0+git"),
        ({"python": (3, 14)}, "python", "note", "expected 3.10 to 3.13 on Linux"),
        ({"system": "Darwin arm64"}, "python", "note", "on Linux"),
        ({"tvm_ffi": None}, "TVM-FFI", "bad", "apache-tvm-ffi is not installed"),
        ({"disassembler": ""}, "nvdisasm", "note", "fa3[inspect]"),
        ({"cache_error": "FA3_CACHE is 0"}, "cache", "note", "not used: FA3_CACHE is 0"),
        ({"peers": {}, "cudnn": None}, "others", "ok", "no other attention library"),
        ({"variables": {"FA3_ARCH": "sm_80"}}, "environment", "ok", "FA3_ARCH=sm_80"),
    ],
)
def test_other_findings(change, name, level, text):
    facts = replace(HOPPER, **change)
    assert text in texts(facts)[name]
    assert levels(facts)[name] == level
    assert doctor.outcome(facts)[0] == (2 if level == "bad" else 0)


def test_cpu_tensors():
    emulated = replace(HOPPER, variables={"FA3_CPU": "emulate"})
    assert _cpu(emulated) == ["CPU tensors: the kernels, on the emulator"]
    (text,) = _cpu(replace(emulated, c_compiler="", c_compiler_error="none of cc, gcc, clang"))
    assert text == "CPU tensors: none, the emulator needs a C compiler"


def test_here(device, capsys):
    """It runs on this machine, and JSON says what the text says."""
    status = cli.main(["doctor"])
    text = capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == status
    for line in (*found["outcome"], *(x["text"].splitlines()[0] for x in found["findings"])):
        assert line in text


def test_a_trial(plain_torch):
    """With a small call; a wrong result would be noticed."""
    assert doctor.trial().level == "ok"
    assert "largest error" in doctor.trial().text


def test_the_trial_notices(plain_torch, monkeypatch):
    from fa3 import interface

    wrong = interface.flash_attn_func
    monkeypatch.setattr(interface, "flash_attn_func", lambda *qkv, causal: wrong(*qkv))
    assert doctor.trial().level == "bad"


def test_the_toolkit_is_the_dsls(device):
    """The same choice as the DSL makes when it is imported."""
    from cutlass.base_dsl.version_info import CUDA_VERSION

    assert toolkit.chosen() == CUDA_VERSION.major


def test_the_toolkit_is_in_an_entrys_name(monkeypatch):
    what = "tests.tiny_kernel:Scale", None, None, "gpu"
    monkeypatch.setattr(toolkit, "of_driver", lambda: (12, 9))
    older = jit.entry_name(*what)
    monkeypatch.setattr(toolkit, "of_driver", lambda: (13, 1))
    assert jit.entry_name(*what) != older
