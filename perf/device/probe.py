"""Step: constants of the timing model that other kernels' speeds tell badly apart.

What an instruction of another warpgroup costs a running product, per register that it reads
(Machine.steal), and how many bytes of fp32 sums L2 takes per cycle and SM (Machine.l2_sums).
"""

from pathlib import Path

import torch

from fa3.inspect.model.machine import Machine
from fa3.launch import jit

from ..probe_kernels import BATCH, NEIGHBOURS, REGISTERS_READ, SUM_BYTES, WAYS, ProbeSignature
from .log import Log, of_failed

MODULE = "perf.probe_kernels"
STEPS = 4000  # of four products
TURNS = 2000  # of sums
WARPS = 4  # of a warpgroup: one on each sub-partition
ATTEMPTS = 6
REPEATS = 5


def work(log: Log, folder: Path) -> None:
    for kind in NEIGHBOURS:
        log.item(f"product beside {kind}", lambda kind=kind: product(kind, "gpu", "cuda", STEPS))
    for way in WAYS:
        log.item(f"sums by {way}", lambda way=way: sums(way, "gpu", "cuda", TURNS))


def product(kind: str, target: str, device, steps: int) -> dict:
    """Cycles of a step of the products, and how many instructions its neighbour did meanwhile.

    The neighbour has to be at it for as long as the products run, and not much longer.
    """
    run = jit.compile(f"{MODULE}:Product", ProbeSignature(kind), None, target)
    found = torch.zeros(2, dtype=torch.int64, device=device)
    numbers = torch.linspace(0.5, 1.0, 512, device=device)
    batches = max(steps // 8, 1)
    for _ in range(ATTEMPTS):
        run(found, numbers, steps, batches)
        products, beside = found.tolist()
        if kind == "none" or products <= beside <= 1.1 * products:
            break
        batches = max(int(1.05 * batches * products / max(beside, 1)), 1)
    taken = []
    for _ in range(REPEATS):
        run(found, numbers, steps, batches)
        taken.append(found.tolist())
    products, beside = sorted(taken)[REPEATS // 2]
    instructions = 0.0 if kind == "none" else batches * BATCH / max(beside, 1)  # a warp's, a cycle
    return {"step_cycles": products / steps, "per_cycle": instructions}


def sums(way: str, target: str, device, turns: int, ctas: int | None = None) -> dict:
    """Bytes of sums per cycle and SM, all SMs at once."""
    if ctas is None:
        ctas = torch.cuda.get_device_properties(device).multi_processor_count
    run = jit.compile(f"{MODULE}:Sums", ProbeSignature(way), None, target)
    found = torch.zeros(ctas, dtype=torch.int64, device=device)
    memory = torch.zeros(ctas * 8 * SUM_BYTES // 4, device=device)
    for _ in range(2):
        run(found, memory, turns)
    if not bool((memory == 2 * turns).all()):
        raise RuntimeError(f"sums are {memory.unique().tolist()[:4]}, expected {2 * turns}")
    cycles = found.double().mean().item()
    return {"bytes_per_cycle": 8 * SUM_BYTES * turns / cycles}


def steal_of(kind: str, alone: float, step: dict) -> float:
    """Cycles that a product loses per register that an instruction of `kind` reads beside it."""
    instructions = step["per_cycle"] * step["step_cycles"]  # of the one warp of a sub-partition
    return (step["step_cycles"] - alone) / (instructions * REGISTERS_READ[kind])


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    by_name = {item["item"]: item for item in items if "error" not in item}
    lines, model = [], Machine()
    alone = by_name.get("product beside none")
    if alone:
        lines.append(f"4 products of 64 x 128 x 16: {alone['step_cycles']:.1f} cycles")
        for kind in (k for k in REGISTERS_READ if f"product beside {k}" in by_name):
            step = by_name[f"product beside {kind}"]
            steal = steal_of(kind, alone["step_cycles"], step)
            lines.append(
                f"beside {kind}, {step['per_cycle']:.2f} per cycle: {step['step_cycles']:.1f}, "
                f"{steal:.2f} lost per register read (model: {model.steal})"
            )
    for way in (way for way in WAYS if f"sums by {way}" in by_name):
        rate = by_name[f"sums by {way}"]["bytes_per_cycle"]
        lines.append(f"sums by {way}: {rate:.1f} bytes per cycle and SM (model: {model.l2_sums})")
    return len(by_name) == len(NEIGHBOURS) + len(WAYS), "\n".join([*lines, *of_failed(items)])
