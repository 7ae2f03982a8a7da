"""Steps: the sweep beside every peer, and the host's time per call."""

from dataclasses import asdict
from pathlib import Path

import torch

from .. import report, sweep, timing
from ..backends import BACKENDS, OURS
from ..cases import HEAD_DIMS, LENGTHS, Case, paper_cases
from .log import Log

ROUNDS = 5
DTYPE = "bf16"
MACHINE = "machine"  # the item that says where and when
CSV = "sweep.csv"


def cases() -> list[Case]:
    return paper_cases([DTYPE], HEAD_DIMS, (False, True), LENGTHS)


def work(log: Log, folder: Path) -> None:
    """Step: `perf.sweep`, an item per case, so that it can go on where it stopped."""
    log.item(MACHINE, lambda: asdict(sweep.this_machine()))
    sample = timing.GpuTimer()
    product = timing.matmul_call(sweep.DTYPES[DTYPE])
    timing.warm_up(product[0], sweep.WARM_UP_SECONDS)
    for case in cases():

        def measure(case=case) -> dict:
            rows = sweep.run_case(case, BACKENDS, product, ROUNDS, sample)
            return {"rows": [asdict(row) for row in rows]}

        log.item(f"{report.FORWARD} {case}", measure)


def rows_of(items: list[dict]) -> list[report.Row]:
    """A case that broke its process gives a row of ours without a time."""
    by_name = {f"{report.FORWARD} {case}": case for case in cases()}
    rows = []
    for item in items:
        rows += [report.Row(**row) for row in item.get("rows", ())]
        if "error" in item and item["item"] in by_name:
            rows.append(report.Row.of(by_name[item["item"]], OURS, note=item["error"][:200]))
    return rows


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    """Also writes the CSV file and the chart, of all cases so far."""
    machine = next((item for item in items if item["item"] == MACHINE), None)
    rows = rows_of(items)
    if machine is None or not rows:
        return False, "no case was measured"
    names = {name: machine[name] for name in report.Machine.__dataclass_fields__}
    where = report.Machine(**names)
    report.write_csv(folder / CSV, rows, where)
    print(report.table(rows), flush=True)
    if report.names(rows):
        try:
            report.write_chart(folder / "sweep.png", rows, where)
        except ImportError as error:  # the picture can be drawn later, from the CSV file
            print(f"no chart: {error}")
    lines = report.summary([(row, where) for row in rows])
    notes = dict.fromkeys(f"{row.backend}: {row.note[:90]}" for row in rows if row.note)
    ours = [row for row in rows if row.backend == OURS]
    good = len(ours) == len(cases()) and all(row.tflops is not None for row in ours)
    return good, "\n".join([*lines, *list(notes)[:6]])


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
