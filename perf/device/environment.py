"""Steps: what machine this is, and how fast anything could be on it."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from .. import sweep, timing
from ..cases import DTYPES
from .log import Log

SMI = (
    "name,driver_version,vbios_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,memory.total,memory.used,persistence_mode,ecc.mode.current"
)
PACKAGES = (
    "nvidia-cutlass-dsl-libs-base",
    "apache-tvm-ffi",
    "flash-attn-4",
    "quack-kernels",
    "nvidia-cudnn-frontend",
    "triton",
    "numpy",
    "pytest",
)
TOOLS = ("compute-sanitizer", "ncu", "nvdisasm", "cuobjdump", "nvcc", "cc")
COPY_BYTES = 4 << 30
REPEATS = 20


def report(log: Log, folder: Path) -> None:
    """Step: GPU, driver, clocks, versions, tools."""
    log.item("gpu", _gpu)
    log.item("software", _software)
    log.item("tools", lambda: {name: tool(name) or "absent" for name in TOOLS})


def _gpu() -> dict:
    values = sweep.nvidia_smi(SMI)
    if not values:
        raise RuntimeError("nvidia-smi gave nothing")
    return dict(zip(SMI.split(","), values, strict=True))


def _software() -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **versions,
    }


def tool(name: str) -> str | None:
    """Its path; the CUDA toolkit is often not on PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def ceilings(log: Log, folder: Path) -> None:
    """Step: matrix products and a copy."""
    sample = timing.GpuTimer()
    call, _ = timing.matmul_call(torch.bfloat16)
    timing.warm_up(call, sweep.WARM_UP_SECONDS)
    for name, dtype in DTYPES.items():
        log.item(f"product {name}", lambda d=dtype: _rate(sample, *timing.matmul_call(d)))
    log.item("copy", lambda: _copy(sample))
    log.item("clocks under load", lambda: sweep.clocks_under_load(call))


def _rate(sample: timing.Sample, call, operations: float) -> dict:
    times = sorted(sample(call, REPEATS))
    return {"tflops": round(operations / times[len(times) // 2] / 1e9, 1)}


def _copy(sample: timing.Sample) -> dict:
    """Bytes read plus bytes written."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = sorted(sample(lambda: target.copy_(source), REPEATS))
    return {"tb_per_s": round(2 * COPY_BYTES / times[len(times) // 2] / 1e9, 2)}


def summarise_report(items: list[dict], folder: Path) -> tuple[bool, str]:
    """One line of the machine; not good where any part could not be read."""
    gpu, software = (
        next((i for i in items if i["item"] == name), {}) for name in ("gpu", "software")
    )
    text = (
        f"{software.get('device', '?')}, {software.get('sms', '?')} SMs, "
        f"driver {gpu.get('driver_version', '?')}, torch {software.get('torch', '?')}, "
        f"DSL {software.get('nvidia-cutlass-dsl-libs-base', '?')}"
    )
    return bool(items) and not any("error" in item for item in items), text


def summarise_ceilings(items: list[dict], folder: Path) -> tuple[bool, str]:
    figures = []
    for item in items:
        name = item["item"].removeprefix("product ")
        if "tflops" in item:
            figures.append(f"{name} {item['tflops']} TFLOPs/s")
        elif "tb_per_s" in item:
            figures.append(f"copy {item['tb_per_s']} TB/s")
    lines = [", ".join(figures)]
    for item in items:
        if "error" in item:
            lines.append(f"{item['item']}: {item['error'][:90]}")
    return bool(items) and not any("error" in item for item in items), "\n".join(lines)
