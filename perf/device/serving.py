"""Step: steps of generation that decide, beside every peer."""

from dataclasses import asdict
from pathlib import Path

import torch

from .. import results, serving, sweep, timing
from .log import Log, of_failed
from .speed import MACHINE, ROUNDS, machine_of

CSV = f"{serving.STEM}.csv"
OURS, PEER = "fa3", "fa3-cpp"
CACHES = ((1, 131_072), (64, 8192))  # sequences, and keys of each


def cases() -> list[serving.Step]:
    """Long ones of one sequence, and of many that fill the machine; the smallest pages once."""
    kinds, dtypes = tuple(serving.QUERIES), ("bf16", "e4m3")
    found = []
    for batch, keys in CACHES:
        found += serving.cases(kinds, dtypes, (batch,), (keys,), (8,), (64,))
    return [*found, *serving.cases(("decode",), dtypes, (batch,), (keys,), (8,), (16,))]


def work(log: Log, folder: Path) -> None:
    """`perf.serving`, an item per case."""
    log.item(MACHINE, lambda: asdict(sweep.this_machine()))
    sample = timing.GpuTimer()
    timing.warm_up(timing.matmul_call(torch.bfloat16)[0], sweep.WARM_UP_SECONDS)
    for case in cases():
        log.item(str(case), lambda case=case: measured(case, sample))


def measured(case: serving.Step, sample: timing.Sample, **options) -> dict:
    """options: of `serving.measure`."""
    rows = serving.measure(case, serving.BACKENDS, ROUNDS, sample, **options)
    return {"rows": [asdict(row) for row in rows]}


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    """Also writes the CSV file."""
    where = machine_of(items)
    rows = [serving.Step(**row) for item in items for row in item.get("rows", ())]
    if where is None or not rows:
        return False, "\n".join(["no case was measured", *of_failed(items)])
    results.write_csv(folder / CSV, rows, where)
    ours = [row for row in rows if row.backend == OURS]
    peers = {str(row): row.us for row in rows if row.backend == PEER and row.us}
    lines = []
    for row in ours:
        beside = f", {PEER} {peers[str(row)]:.1f} us" if str(row) in peers else ""
        lines.append(f"{row}: {serving.told(row)}{beside}")
    good = len(ours) == len(cases()) and all(row.us is not None for row in ours)
    return good, "\n".join([*lines, *of_failed(items)])
