"""`python -m fa3 warm`: the kernels that it compiles are those that calls ask for."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

import fa3
from fa3 import warm
from fa3.inspect import cli
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import Signature
from fa3.launch import cache, dispatch, jit

from .tiny_kernel import TinyConfig, TinySignature

ROOT = Path(__file__).resolve().parents[1]


def kernels(line: str, arch: str | None = "sm_90a") -> list[warm.Wanted]:
    args = cli.arguments(["warm", *line.split()])
    target = dispatch.Target("gpu", "some GPU", dispatch.ARCHITECTURES[arch], 132, arch)
    return warm.wanted(warm.calls_of(args), target)


def signatures(line: str, arch: str = "sm_90a") -> list:
    return [kernel.signature for kernel in kernels(line, arch)]


def test_training():
    forward, backward = kernels("--head-dim 104 --dtype fp16 --causal --backward")
    assert forward.signature == Signature("fp16", 128, 128, "causal")
    assert backward.signature == BwdSignature("fp16", 128, 128, "causal")
    for kernel in (forward, backward):
        assert (kernel.kind, kernel.arch) == ("gpu", "sm_90a")
    assert forward.name == "sm90.forward.operands_16bit fp16 128 128 causal"


def test_several_head_dims_and_dtypes_share_what_they_can():
    found = signatures("--head-dim 64 112 128 --dtype bf16 e4m3 --splits")
    shape = [(getattr(s, "dtype", None), getattr(s, "head_dim", None)) for s in found]
    both = [(dtype, d) for d in (64, 128) for dtype in ("bf16", "e4m3") for _ in range(2)]
    assert sorted(x for x in shape if x[1]) == sorted(both)
    assert len(found) == len(both) + 1  # the kernel that combines splits


def test_caches_in_pages():
    found = signatures("--head-dim 128 --cache --page-size 64 --causal")
    attention = [s for s in found if isinstance(s, Signature)]
    assert {s.is_split for s in attention} == {False, True}
    assert {(s.mask, s.page_rows, s.is_ragged) for s in attention} >= {("causal", 64, True)}
    assert {s.packs_heads for s in attention} == {False, True}  # of many queries, and of few
    others = [s for s in found if s not in attention]
    assert [type(s).__name__ for s in others[:2]] == ["CombineSignature", "AppendSignature"]
    assert {(type(s).__name__, s.mask, s.tile_m) for s in others[2:]} == {
        ("ListSignature", "causal", rows) for rows in (64, 128)
    }


def test_a_cache_of_bytes():
    found = signatures("--head-dim 128 --cache --cache-dtype e4m3")
    assert {s.widens for s in found if isinstance(s, Signature)} == {"e4m3"}
    assert [s.narrows for s in found if hasattr(s, "narrows")] == ["e4m3"]


@pytest.mark.parametrize(
    "line",
    [
        "--head-dim 64 --varlen --backward --deterministic",
        "--head-dim 128 --varlen --dtype e4m3",
        "--head-dim 128 --varlen --dtype int8 --scales head --splits",
        "--head-dim 64 --quantize --varlen",
        "--head-dim 96 --sinks --softcap 30 --window 100 20",
        "--head-dim 64 --cache --dtype e4m3 --scales head --page-size 16",
        "--head-dim 192 --head-dim-v 128 --cache --sinks",
        "--head-dim 128 --cache --cache-dtype e4m3 --page-size 64",
    ],
)
def test_every_option_leads_to_kernels(line):
    wanted = kernels(line)
    found = [kernel.signature for kernel in wanted]
    ragged = [s for s in found if hasattr(s, "is_ragged")]
    assert all(s.is_ragged for s in ragged) == ("--varlen" in line or "--cache" in line)
    assert len(set(wanted)) == len(wanted) >= 1
    words = {x for s in found for x in _values(s)}
    for option, word in (("--sinks", "sinks"), ("--softcap", "softcap"), ("--window", "local")):
        assert (word in words) == (option in line)


def _values(signature):
    for field in fields(signature):
        value = getattr(signature, field.name)
        if is_dataclass(value):
            yield from _values(value)
        yield field.name if value is True else value


def test_ampere_has_kernels_of_its_own():
    where = [kernel.kernel for kernel in kernels("--head-dim 64 --backward", "sm_80")]
    assert [x.split(".")[2] for x in where] == ["sm80", "sm80"]


def test_what_a_call_takes_is_there(device, monkeypatch, tmp_path):
    """The names of the entries are those that a call looks for."""
    seen = []

    def note(kernel, signature, config, kind, arch=jit.ARCH):
        seen.append(warm.Wanted(kernel, signature, config, kind, arch))
        return lambda *arguments: None

    monkeypatch.setattr(jit, "compile", note)
    warm._forget_plans()
    q, k, v = (torch.zeros(3, 77, 4, 128, device=device).bfloat16() for _ in range(3))
    try:
        fa3.flash_attn_func(q, k, v, causal=True)
    finally:
        warm._forget_plans()
    target = dispatch.target_of(device)
    args = cli.arguments("warm --head-dim 128 --causal".split())
    assert warm.wanted(warm.calls_of(args), target) == seen
    assert dispatch.target_of(device) is target  # and nothing is left of the stand-ins
    assert jit.compile is note


def test_a_pool_fills_a_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    what = "tests.tiny_kernel:Scale", TinySignature(), TinyConfig()
    good = warm.Wanted(*what, "gpu", "sm_90a")
    bad = warm.Wanted("tests.tiny_kernel:Nothing", *what[1:], "gpu", "sm_90a")
    assert not cache.holds(good.entry)
    assert warm.fill([good, bad], processes=1) == 1
    assert cache.holds(good.entry) and not cache.holds(bad.entry)
    out, err = capsys.readouterr()
    assert "/2]" in out and "tests.tiny_kernel 32" not in err
    assert "FAILED  tests.tiny_kernel" in err and "Nothing" in err


def test_nothing_is_compiled_twice(monkeypatch, capsys):
    monkeypatch.setattr(cache, "holds", lambda name: True)
    monkeypatch.setattr(warm, "fill", lambda *_: pytest.fail("it compiled"))
    assert cli.main("warm --head-dim 64 --arch sm_90a".split()) == 0
    assert capsys.readouterr().out.startswith("1 kernel for ")


@pytest.mark.parametrize(
    "line, message",
    [
        ("--head-dim 63", "q has head dim 63, expected a multiple of 8"),
        ("--head-dim 64 --dtype fp9", "--dtype is 'fp9'"),
        ("--head-dim 64 --jobs 0", "--jobs is 0, expected at least 1"),
        ("--head-dim 64 --deterministic", "expected --backward"),
        ("--head-dim 64 --cache --backward", "--cache does not go with --backward"),
        ("--head-dim 64 --cache-dtype e4m3", "--cache-dtype goes with --cache"),
        ("--head-dim 64 --cache --cache-dtype e4m3 --dtype e4m3", "goes with 16-bit tensors"),
        ("--head-dim 64 --quantize --dtype e4m3", "--quantize takes 16-bit tensors"),
        ("--head-dim 64 --arch sm_80 --dtype e4m3", "has no kernel for FP8"),
    ],
)
def test_bad_options(line, message, capsys):
    assert cli.main(["warm", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("fa3 warm: ") and out == ""


def test_a_folder_that_keeps_nothing(monkeypatch, capsys):
    monkeypatch.setenv("FA3_CACHE", "0")
    assert cli.main("warm --head-dim 64".split()) == 1
    assert capsys.readouterr().err == "fa3 warm: nothing can be kept: FA3_CACHE is 0\n"
