"""Step: candidate configs timed side by side; the winners as rows of the tuning table.

The kernels whose sweep fell furthest behind a peer come first. Every candidate is an item: first
its compilation and its output beside fp32, so that one that hangs or is wrong is out, then one item
in which all that are left are timed in interleaved rounds.
"""

import math
import statistics
from concurrent.futures import Future
from pathlib import Path

import torch

from .. import check, results, timing
from ..cases import FORWARD, FORWARD_FP8, HIDDEN, TOKENS
from ..variants import as_code, name_of
from .compiling import compile_one, pool
from .log import Log, of_failed
from .passes import PASSES
from .small import decoded
from .speed import CSV

LENGTHS = (1024, 4096, 16_384)
ROUNDS = 3
TRIAL = (1, 900, 4)  # b, s, h of the check
WINNER = "times"  # the last word of the item that holds the times of all


def by_need(signatures: list, csv_file: Path) -> list:
    """Those first whose worst row of the sweep is furthest behind the best peer."""
    worst: dict[tuple, float] = {}
    if csv_file.is_file():
        rows = [row for row, _ in results.read_csv(csv_file)]
        ratios = results.ratios(rows).items()
        for case, ratio in ((c, x) for c, x in ratios if c[3] in (FORWARD, FORWARD_FP8)):
            panel = case[0], case[1], "causal" if case[2] else "full"
            worst[panel] = min(ratio, worst.get(panel, math.inf))

    def place(signature) -> float:
        panel = signature.dtype, signature.head_dim, signature.mask
        same = signature.head_dim == signature.head_dim_v
        return worst.get(panel, math.inf) if same else math.inf

    return sorted(signatures, key=place)


def work(log: Log, folder: Path) -> None:
    sample = timing.GpuTimer()
    timing.warm_up(timing.matmul_call(torch.bfloat16)[0], 1.0)
    with pool() as processes:
        todo = []
        for number, row in enumerate(PASSES):
            for signature in by_need(row.tuned(), folder / CSV):
                jobs = {
                    config: processes.submit(compile_one, number, signature, config)
                    for config in row.candidates(signature)
                }
                todo.append((row, signature, jobs))
        for row, signature, jobs in todo:
            _one(log, row, signature, jobs, sample)


def _one(log: Log, row, signature, jobs: dict[object, Future], sample: timing.Sample) -> None:
    kernel = f"{row.name} {name_of(signature)}"

    def trial(config, job: Future) -> dict:
        job.result()
        inputs = row.draw(signature, *TRIAL, "cuda")
        return {"row_error": try_out(row, signature, config, inputs)}

    for config, job in jobs.items():
        log.item(f"{kernel} {as_code(config)}", lambda c=config, j=job: trial(c, j))
    lines = {line["item"]: line for line in log.ended()}
    good = [c for c in jobs if "error" not in lines[f"{kernel} {as_code(c)}"]]
    log.item(f"{kernel} {WINNER}", lambda: times_of(row, signature, good, sample))


def try_out(row, signature, config, inputs) -> float:
    """The error of a config's output; raises where it is not right."""
    causal = signature.mask == "causal"
    out = row.bind(config, causal, *inputs)()
    length = out.shape[1]
    seen = check.visible_keys(length, length, -1, 0 if causal else -1, out.device)
    heads_first = [x.transpose(1, 2).flatten(0, 1) for x in decoded(*inputs)]
    exact = check.attention(*heads_first, seen).unflatten(0, (out.shape[0], -1)).transpose(1, 2)
    error = check.row_error(out, exact)
    if error > check.ROW_ERROR[signature.dtype]:
        raise ValueError(f"wrong output: a row is off by {error:.2g} of its length")
    return error


def times_of(row, signature, configs: list, sample: timing.Sample, lengths=LENGTHS) -> dict:
    """Geometric mean over the lengths of every config's TFLOPs/s, the best first."""
    speeds: dict[object, list[float]] = {config: [] for config in configs}
    causal = signature.mask == "causal"
    for length in lengths:
        batch, heads = max(TOKENS // length, 1), max(HIDDEN // signature.head_dim, 1)
        inputs = row.draw(signature, batch, length, heads, "cuda")
        calls = {config: row.bind(config, causal, *inputs) for config in configs}
        pairs = batch * heads * length**2 * (0.5 if causal else 1.0)
        operations = 2.0 * (signature.head_dim + signature.head_dim_v) * pairs
        for config, times in timing.interleave(calls, ROUNDS, sample).items():
            speeds[config].append(operations / statistics.median(times) / 1e9)
    means = {as_code(c): round(statistics.geometric_mean(s), 1) for c, s in speeds.items()}
    return {
        "dims": [signature.head_dim, signature.head_dim_v],
        "mask": signature.mask,
        "shipped": as_code(row.config(signature)),
        "tflops": dict(sorted(means.items(), key=lambda pair: -pair[1])),
    }


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    """Rows of the tuning table with their measured speed, and what the shipped config reached."""
    out = [i for i in items if "error" in i]
    timed = [item for item in items if item.get("tflops")]
    lines = [f"{len(timed)} kernels, {len(items) - len(timed)} candidates, {len(out)} of them out"]
    for item in timed:
        best, speed = next(iter(item["tflops"].items()))
        shipped = item["tflops"].get(item["shipped"])
        line = f'{tuple(item["dims"])}: {{"{item["mask"]}": {best}}},  # {speed:.0f}'
        if best != item["shipped"]:
            line += f"; shipped {item['shipped']}: {'out' if shipped is None else f'{shipped:.0f}'}"
        lines.append(line)
    return bool(timed), "\n".join([*lines, *of_failed(items)])
