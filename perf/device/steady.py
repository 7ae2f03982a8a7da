"""Steps: the same bits every time, and memory that grows with the outputs alone."""

from pathlib import Path

import torch

from .log import Log, of_failed
from .passes import PASSES
from .small import BITS, Small

RUNS = 200
LENGTHS = tuple(2**n for n in range(16, 21))  # to 1M tokens
SLACK_BYTES = 2 << 20  # the unit in which the driver gives memory


def repeat(log: Log, folder: Path) -> None:
    """Step: the same call RUNS times, compared bit by bit with the first."""
    for row in PASSES:
        for case in row.repeated:
            log.item(f"{row.name} {case}", lambda r=row, c=case: repeat_one(r, c, "cuda", RUNS))


def repeat_one(row, case: Small, device, runs: int) -> dict:
    inputs = case.inputs(device)
    first = row.call(case, inputs)
    different = 0
    for _ in range(runs - 1):
        again = row.call(case, inputs)
        # as bits: a NaN equals itself
        different += not all(torch.equal(bits(first[name]), bits(again[name])) for name in first)
    return {"runs": runs, "different": different}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def memory(log: Log, folder: Path) -> None:
    """Step: memory that one call takes beside its inputs and outputs, by length."""
    for row in (row for row in PASSES if row.tuned()):
        memory_one(row, 256)  # loads what is loaded only once
        for length in LENGTHS:
            log.item(f"{row.name} {length}", lambda r=row, n=length: memory_one(r, n))


def memory_one(row, length: int) -> dict:
    signature = next(s for s in row.tuned() if (s.head_dim, s.mask) == (128, "causal"))
    case = Small(signature.dtype, 128, 128, length, length, causal=True, h_q=1)
    inputs = row.draw(signature, 1, length, 1, "cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, free_before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    reserved = torch.cuda.memory_reserved()
    outputs = row.call(case, inputs)
    torch.cuda.synchronize()
    own = sum(x.numel() * x.element_size() for x in outputs.values())
    grown = torch.cuda.memory_reserved() - reserved
    return {
        "output_bytes": own,
        "extra_bytes": torch.cuda.max_memory_allocated() - before - own,
        "outside_torch_bytes": free_before - torch.cuda.mem_get_info()[0] - grown,
        "finite": all(bool(x.isfinite().all()) for x in outputs.values()),
    }


def summarise_repeat(items: list[dict], folder: Path) -> tuple[bool, str]:
    wrong = [item for item in items if item.get("different") != 0]
    lines = [f"{len(items) - len(wrong)} of {len(items)} cases: the same bits in all runs"]
    for item in wrong:
        why = item.get("error", f"{item.get('different')} of {item.get('runs')} runs differ")
        lines.append(f"{item['item']}: {why[:100]}")
    return bool(items) and not wrong, "\n".join(lines)


def summarise_memory(items: list[dict], folder: Path) -> tuple[bool, str]:
    bad = of_failed(items)
    lines, good = [], bool(items) and not bad
    for item in (item for item in items if "error" not in item):
        extra = max(item["extra_bytes"], item["outside_torch_bytes"])
        good = good and extra <= SLACK_BYTES and item["finite"]
        beside, own = extra / 2**20, item["output_bytes"] / 2**20
        finite = "" if item["finite"] else ", not finite"
        lines.append(f"{item['item']}: {beside:.2f} MiB beside {own:.0f} MiB of outputs{finite}")
    return good, "\n".join([*lines, *bad])
