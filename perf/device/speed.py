"""Steps: the sweep beside every peer, what decides first; and the host's time per call."""

from dataclasses import asdict
from pathlib import Path

import torch

from .. import bandwidth, charts, report, results, sweep, timing
from ..backends import BACKENDS, OURS
from ..cases import DTYPES, HEAD_DIMS, LENGTHS, TRAINING, Case, paper_cases
from .log import Log, of_failed

ROUNDS = 5
SWEPT = ("bf16", "e4m3")
DECIDING = (1024, 4096, 16_384)  # lengths
SHORTEST = DECIDING[0]
MACHINE = "machine"  # the item that says where and when
CSV = "sweep.csv"
MOVED_CSV = "quantize.csv"
FIELDS = results.Machine.__dataclass_fields__


def cases() -> list[Case]:
    return paper_cases(SWEPT, HEAD_DIMS, (False, True), LENGTHS)


def first_cases() -> list[Case]:
    """Those that decide."""
    return [c for c in cases() if c.of_pass != TRAINING and c.length in DECIDING]


def work(log: Log, folder: Path) -> None:
    """Step: `perf.sweep` of the first cases, an item each, so that it can go on after a stop."""
    _sweep(log, first_cases())


def rest(log: Log, folder: Path) -> None:
    """Step: of all others."""
    first = set(first_cases())
    _sweep(log, [case for case in cases() if case not in first])


def _sweep(log: Log, chosen: list[Case]) -> None:
    log.item(MACHINE, lambda: asdict(sweep.this_machine()))
    sample = timing.GpuTimer()
    products = {name: timing.matmul_call(DTYPES[name]) for name in SWEPT}
    timing.warm_up(products[SWEPT[0]][0], sweep.WARM_UP_SECONDS)
    for case in chosen:

        def measure(case=case) -> dict:
            backends, product = BACKENDS[case.of_pass], products[case.dtype]
            rows = sweep.run_case(case, backends, product, ROUNDS, sample)
            return {"rows": [asdict(row) for row in rows]}

        log.item(f"{case.of_pass} {case}", measure)


def rows_of(items: list[dict]) -> list[results.Row]:
    """A case that broke its process gives a row of ours without a time."""
    by_name = {f"{case.of_pass} {case}": case for case in cases()}
    rows = []
    for item in items:
        rows += [results.Row(**row) for row in item.get("rows", ())]
        if "error" in item and item["item"] in by_name:
            rows.append(results.Row.of(by_name[item["item"]], OURS, note=item["error"][:200]))
    return rows


def machine_of(items: list[dict]) -> results.Machine | None:
    item = next((item for item in items if item["item"] == MACHINE), None)
    return item and results.Machine(**{name: item[name] for name in FIELDS})


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    """Of the first cases."""
    return _summary(items, first_cases(), folder)


def summarise_rest(items: list[dict], folder: Path) -> tuple[bool, str]:
    """Of all, with what the step of the first ones left."""
    return _summary(Log(folder / "sweep.jsonl").ended() + items, cases(), folder)


def _summary(items: list[dict], wanted: list[Case], folder: Path) -> tuple[bool, str]:
    """Also writes the CSV file and the chart, of all cases so far."""
    where, rows = machine_of(items), rows_of(items)
    if where is None or not rows:
        return False, "no case was measured"
    results.write_csv(folder / CSV, rows, where)
    print(report.table(rows), flush=True)
    if results.names(rows):
        try:
            charts.write_chart(folder / "sweep.png", rows, where)
        except ImportError as error:  # the picture can be drawn later, from the CSV file
            print(f"no chart: {error}")
    lines = report.summary([(row, where) for row in rows])
    notes = dict.fromkeys(f"{row.backend}: {row.note[:90]}" for row in rows if row.note)
    ours = [row for row in rows if row.backend == OURS]
    good = len(ours) == len(wanted) and all(row.tflops is not None for row in ours)
    return good, "\n".join([*lines, *list(notes)[:6]])


def quantise(log: Log, folder: Path) -> None:
    """Step: `perf.bandwidth`, an item per case."""
    log.item(MACHINE, lambda: asdict(sweep.this_machine()))
    sample = timing.GpuTimer()
    timing.warm_up(timing.matmul_call(DTYPES[SWEPT[0]])[0], sweep.WARM_UP_SECONDS)
    for case in bandwidth.cases():
        log.item(case.of, lambda c=case: {"row": asdict(bandwidth.measure(c, ROUNDS, sample))})


def summarise_quantise(items: list[dict], folder: Path) -> tuple[bool, str]:
    """Also writes the CSV file."""
    where = machine_of(items)
    rows = [bandwidth.Moved(**item["row"]) for item in items if "row" in item]
    if where is None or not rows:
        return False, "no case was measured"
    results.write_csv(folder / MOVED_CSV, rows, where)
    lines = [bandwidth.summary([(row, where) for row in rows]), *of_failed(items)]
    return len(rows) == len(bandwidth.cases()), "\n".join(lines)


def host_overhead(log: Log, folder: Path) -> None:
    """Step: `perf.host_overhead`."""
    from .. import host_overhead as host

    device = torch.device("cuda", torch.cuda.current_device())
    log.item("microseconds", lambda: {name.strip(): us for name, us in host.rows(device, False)})


def summarise_host(items: list[dict], folder: Path) -> tuple[bool, str]:
    found = items[0] if items else {"error": "nothing was measured"}
    if "error" in found:
        return False, found["error"]
    times = {name: us for name, us in found.items() if name not in ("item", "seconds")}
    return True, "\n".join(f"{us:8.2f} us  {name}" for name, us in times.items())
