"""`python -m fa3 doctor`: what would run on this machine, and why not.

`gather` looks at the machine, `findings` judges what it saw.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .emulator import dsl, shim
from .emulator.errors import SetupError
from .inspect.sass import DisassemblerMissing, nvdisasm
from .kernels.bwd_signature import BwdSignature
from .kernels.signature import Quantised, Signature
from .launch import cache, dispatch, toolkit

OLDEST_TORCH = (2, 11)
DSL_LIBRARIES = "nvidia-cutlass-dsl-libs-base"
PEERS = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
    "transformer-engine",
    "transformers",
    "xformers",
)
VARIABLES = (
    "FA3_CPU",
    "FA3_ARCH",
    "FA3_CACHE",
    "FA3_CACHE_DIR",
    "XDG_CACHE_HOME",
    "CC",
    "NVDISASM",
)
# What a GPU is asked for: a name, and a signature.
KINDS = {
    "16-bit forward": Signature("bf16", 128, 128, "causal"),
    "16-bit backward": BwdSignature("bf16", 128, 128, "causal"),
    "FP8 forward": Signature("e4m3", 128, 128, "causal", Quantised("e4m3", "e4m3", "bf16")),
    "cache in pages": Signature("bf16", 128, 128, "causal", is_ragged=True, page_rows=64),
}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """What was seen, nothing judged."""

    system: str
    python: tuple[int, int]
    torch: str
    torch_cuda: str | None  # the CUDA version that torch was built with
    cudnn: int | None
    driver: str | None
    driver_cuda: tuple[int, int] | None  # the newest CUDA version that the driver runs
    gpus: tuple[Gpu, ...]
    gpu_error: str  # why torch sees none
    dsl: str | None
    toolkits: tuple[int, ...]  # CUDA major versions that the DSL has libraries for
    tvm_ffi: str | None
    c_compiler: str
    c_compiler_error: str
    disassembler: str
    cache_folder: str
    cache_error: str
    cache_entries: int
    cache_bytes: int
    peers: dict[str, str]  # those installed, by version
    variables: dict[str, str]


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    name: str
    level: str  # ok, note: something is missing that most do without, bad: nothing runs like this
    text: str


def gather() -> Facts:
    gpus, gpu_error = _gpus()
    compiler, compiler_error = _c_compiler()
    folder, why = cache.folder(), cache.why_not()
    entries = [] if why else [x.stat().st_size for x in folder.glob("*.zip")]
    return Facts(
        system=f"{platform.system()} {platform.machine()}",
        python=sys.version_info[:2],
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.version.cuda else None,
        driver=_driver(),
        driver_cuda=toolkit.of_driver(),
        gpus=gpus,
        gpu_error=gpu_error,
        dsl=_version(DSL_LIBRARIES),
        toolkits=toolkit.installed(),
        tvm_ffi=_version("apache-tvm-ffi"),
        c_compiler=compiler,
        c_compiler_error=compiler_error,
        disassembler=_disassembler(),
        cache_folder=str(folder or ""),
        cache_error=why,
        cache_entries=len(entries),
        cache_bytes=sum(entries),
        peers={name: found for name in PEERS if (found := _version(name))},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    if torch.version.cuda is None:
        return (), f"torch {torch.__version__} is built without CUDA"
    try:
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        return (), str(error).splitlines()[0]
    gpus = tuple(Gpu(x.name, (x.major, x.minor)) for x in found)
    return gpus, "" if gpus else "torch sees no GPU"


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found and found[0]


def _c_compiler() -> tuple[str, str]:
    try:
        return " ".join(shim.compiler()), ""
    except SetupError as error:
        return "", str(error)


def _disassembler() -> str:
    try:
        return str(nvdisasm())
    except DisassemblerMissing:
        return ""


def findings(facts: Facts) -> list[Finding]:
    """The lines of the report, in the order of what builds on what."""
    return [
        *_python(facts),
        *_torch(facts),
        *_driver_and_gpus(facts),
        *_dsl(facts),
        *_tools(facts),
        *_cache(facts),
        *_peers(facts),
    ]


def _python(facts: Facts) -> list[Finding]:
    major, minor = facts.python
    known = (3, 10) <= facts.python <= (3, 13) and facts.system.startswith("Linux")
    text = f"{major}.{minor}, {facts.system}"
    if not known:
        text += ": expected 3.10 to 3.13 on Linux"
    return [Finding("python", "ok" if known else "note", text)]


def _torch(facts: Facts) -> list[Finding]:
    built = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    text = f"{facts.torch}, {built}"
    if tuple(map(int, re.findall(r"\d+", facts.torch)[:2])) < OLDEST_TORCH:
        return [Finding("torch", "bad", f"{text}: expected {'.'.join(map(str, OLDEST_TORCH))} on")]
    return [Finding("torch", "ok", text)]


def _driver_and_gpus(facts: Facts) -> list[Finding]:
    if facts.driver_cuda is None:
        driver = Finding("driver", "note", "no NVIDIA driver: libcuda.so.1 cannot be loaded")
    else:
        runs = "{}.{}".format(*facts.driver_cuda)
        driver = Finding("driver", "ok", f"{facts.driver or 'version unknown'}, up to CUDA {runs}")
    if not facts.gpus:
        return [driver, Finding("GPU", "note", facts.gpu_error)]
    return [driver, *(x for i, gpu in enumerate(facts.gpus) for x in _gpu(i, gpu))]


def _gpu(index: int, gpu: Gpu) -> list[Finding]:
    found = served(gpu)
    lines = [f"{kind}: {text}" for kind, (_, text) in found.items()]
    head = f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    level = "ok" if any(runs for runs, _ in found.values()) else "bad"
    return [Finding(f"GPU {index}", level, "\n".join([head, *lines]))]


def served(gpu: Gpu) -> dict[str, tuple[bool, str]]:
    """By kind of call: whether the GPU has a kernel, and its name or why not."""
    target = dispatch.Target("gpu", gpu.name, gpu.capability, 132)
    found = {}
    for kind, signature in KINDS.items():
        is_backward = isinstance(signature, BwdSignature)
        choose = dispatch.backward if is_backward else dispatch.forward
        try:
            found[kind] = True, choose(signature, target).name
        except NotImplementedError as error:
            found[kind] = False, f"no kernel: {_reason(error, gpu)}"
    return found


def _reason(error: NotImplementedError, gpu: Gpu) -> str:
    """The one that is not about another architecture, if there is one."""
    reasons = [line.partition(": ")[2] for line in str(error).splitlines()[1:]]
    own = [x for x in reasons if not x.startswith(("it needs compute", "it takes"))]
    return own[0] if own else f"it needs compute capability {dispatch.CAPABILITIES}"


def _dsl(facts: Facts) -> list[Finding]:
    if facts.dsl is None:
        return [Finding("CuTe DSL", "bad", "nvidia-cutlass-dsl is not installed: pip install fa3")]
    chosen = toolkit.choose(facts.toolkits, facts.driver_cuda)
    has = ", ".join(map(str, facts.toolkits)) or "none"
    text = f"{facts.dsl}, with libraries of CUDA {has}"
    if chosen is None:
        text += ": none of them runs with this driver"
        return [Finding("CuTe DSL", "bad", text)]
    text += f"; compiles with those of {chosen}"
    level = "ok"
    if facts.driver_cuda and facts.driver_cuda[0] > chosen:
        level = "note"
        text += f"; the driver runs newer ones: pip install 'fa3[cu{facts.driver_cuda[0]}]'"
    if facts.dsl not in dsl.KNOWN_VERSIONS:
        level = "note"
        text += f"; the emulator works with {' or '.join(dsl.KNOWN_VERSIONS)} alone"
    if facts.tvm_ffi is None:
        return [
            Finding("CuTe DSL", level, text),
            Finding("TVM-FFI", "bad", "apache-tvm-ffi is not installed: pip install fa3"),
        ]
    return [Finding("CuTe DSL", level, text), Finding("TVM-FFI", "ok", facts.tvm_ffi)]


def _tools(facts: Facts) -> list[Finding]:
    if facts.c_compiler:
        compiler = Finding("C compiler", "ok", f"{facts.c_compiler}, for the emulator")
    else:
        compiler = Finding("C compiler", "note", facts.c_compiler_error)
    missing = "none, for `python -m fa3 inspect`: pip install 'fa3[inspect]'"
    found = facts.disassembler
    return [compiler, Finding("nvdisasm", "ok" if found else "note", found or missing)]


def _cache(facts: Facts) -> list[Finding]:
    if facts.cache_error:
        return [Finding("cache", "note", f"not used: {facts.cache_error}")]
    size = f"{facts.cache_entries} kernels, {facts.cache_bytes / 1e6:.1f} MB"
    return [Finding("cache", "ok", f"{facts.cache_folder}: {size}")]


def _peers(facts: Facts) -> list[Finding]:
    found = [f"{name} {number}" for name, number in facts.peers.items()]
    if facts.cudnn:
        found.append(f"cuDNN {facts.cudnn} (torch's)")
    lines = [Finding("others", "ok", ", ".join(found) or "no other attention library")]
    given = ", ".join(f"{name}={value}" for name, value in facts.variables.items())
    return [*lines, Finding("environment", "ok", given or "nothing set")]


def outcome(facts: Facts) -> tuple[int, list[str]]:
    """The exit status, and what it says of CUDA and CPU tensors.

    0: some GPU here gets kernels; 1: none does, CPU tensors are computed; 2: nothing is.
    """
    bad = [x.name for x in findings(facts) if x.level == "bad" and not x.name.startswith("GPU")]
    if bad:
        return 2, [f"nothing runs here: see {', '.join(bad)}"]
    serving = [gpu for gpu in facts.gpus if any(runs for runs, _ in served(gpu).values())]
    if serving:
        gpus = f"CUDA tensors: kernels, on {', '.join(gpu.name for gpu in serving)}"
    else:
        why = facts.gpu_error or "no GPU here has a kernel"
        gpus = f"CUDA tensors: none, {why}"
    cpu = "plain torch; with FA3_CPU=emulate the kernels, on the emulator"
    if facts.variables.get("FA3_CPU") == "emulate":
        cpu = "the kernels, on the emulator"
        if facts.c_compiler_error:
            cpu = "none, the emulator needs a C compiler"
    return int(not serving), [gpus, f"CPU tensors: {cpu}"]


def trial() -> Finding:
    """A small call on what this machine would use, compared with fp32."""
    from .interface import flash_attn_func

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 64, generator=generator).bfloat16() for _ in range(3))
    try:
        out = flash_attn_func(*(x.to(device) for x in (q, k, v)), causal=True)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * 64**-0.5
        scores += torch.full((200, 200), float("-inf")).triu(1)
        exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float())
        error = (out.cpu().float() - exact).abs().max().item()
    except Exception as failure:  # noqa: BLE001 - whatever it is, it is the answer
        return Finding("trial", "bad", f"{type(failure).__name__}: {failure}")
    how = dispatch.target_of(torch.device(device)).name
    text = f"causal attention in bf16 on {how}: largest error {error:.1e}"
    return Finding("trial", "ok" if error < 0.03 else "bad", text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What would run on this machine, and why not. Exit status: 0 if some GPU here gets "
        "kernels, 1 if none does and CPU tensors are computed, 2 if nothing is."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--run", action="store_true", help="also compute something small")


def run(args: argparse.Namespace) -> int:
    facts = gather()
    found = findings(facts)
    status, words = outcome(facts)
    if args.run:
        tried = trial()
        found.append(tried)
        status = status if tried.level == "ok" else 2
    if args.json:
        lines = [asdict(x) for x in found]
        content = {"status": status, "outcome": words, "findings": lines, "facts": asdict(facts)}
        print(json.dumps(content, indent=1))
    else:
        print("\n".join([f"fa3 {_own_version()}", *map(_line, found), "", *words]))
    return status


def _own_version() -> str:
    spec = importlib.util.find_spec(__package__)
    return f"{_version('fa3') or 'not installed'}, {Path(spec.origin).parent}"


def _line(finding: Finding) -> str:
    mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[finding.level]
    first, *others = finding.text.splitlines()
    head = f"{mark}  {finding.name:12} {first}"
    return "\n".join([head, *(f"{'':19}{line}" for line in others)])
