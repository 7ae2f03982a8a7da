"""What was measured: rows of CSV files that carry the machine, and what follows from them."""

import csv
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from .backends import FA2_OWN, OURS, OWN
from .cases import BACKWARD, FORWARD, TRAINING, Case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "perf" / "results"  # what was measured and committed
SWEEP = "sweep"  # beginning of the names of files with Rows


@dataclass(frozen=True)
class Machine:
    """Where and when a sweep ran."""

    device: str
    driver: str
    torch: str
    dsl: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One backend on one case. Where it has no time, `note` says why and the numbers are None."""

    dtype: str
    head_dim: int
    causal: bool
    length: int
    batch: int
    heads: int
    backend: str
    ms: float | None = None  # median
    ms_low: float | None = None  # quartiles
    ms_high: float | None = None
    tflops: float | None = None
    matmul_tflops: float | None = None  # of the matrix product timed among the same rounds
    percent_of_matmul: float | None = None
    row_error: float | None = None
    sm_mhz: int | None = None  # under load, after the case
    memory_mhz: int | None = None
    note: str = ""
    of_pass: str = FORWARD

    @classmethod
    def of(cls, case: Case, backend: str, **measured) -> "Row":
        return cls(
            case.dtype,
            case.head_dim,
            case.causal,
            case.length,
            case.batch,
            case.heads,
            backend,
            of_pass=case.of_pass,
            **measured,
        )

    @property
    def panel(self) -> tuple[str, int, bool, str]:
        return self.dtype, self.head_dim, self.causal, self.of_pass

    @property
    def title(self) -> str:
        what = f", {self.of_pass}" if self.of_pass in (BACKWARD, TRAINING) else ""
        return f"{self.dtype} head dim {self.head_dim} {'causal' if self.causal else 'full'}{what}"


Measured = tuple[Row, Machine]


def panels(rows: Iterable[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row.panel)]


def names(rows: Iterable[Row]) -> list[str]:
    """The backends that have at least one time, in the order of the rows."""
    return list(dict.fromkeys(row.backend for row in rows if row.tflops is not None))


def write_csv(path: Path, rows: list, machine: Machine) -> None:
    """A line per row, of one kind; each carries the machine, so that files can be joined."""
    columns = [f.name for f in fields(rows[0])] + [f.name for f in fields(Machine)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({**asdict(row), **asdict(machine)})


def read_csv(path: Path, kind=Row) -> list[tuple]:
    """(row, machine) of what write_csv wrote; a column that is not there gets its default."""
    with path.open(newline="") as file:
        return [(_parsed(kind, line), _parsed(Machine, line)) for line in csv.DictReader(file)]


def read_all(folder: Path, stem: str = SWEEP, kind=Row) -> list[tuple]:
    """Of all files of a folder whose names begin so."""
    return [line for path in sorted(folder.glob(f"{stem}*.csv")) for line in read_csv(path, kind)]


def _parsed(kind, line: dict[str, str]):
    values = {}
    for field in fields(kind):
        text = line.get(field.name)
        if text is None:
            continue
        (plain, *_) = typing.get_args(field.type) or (field.type,)
        if plain is bool:
            values[field.name] = text == "True"
        elif plain is str or text:
            values[field.name] = plain(text)
    return kind(**values)


def ratios(rows: Iterable[Row]) -> dict[tuple, float]:
    """Ours over the best peer, by (dtype, head_dim, causal, pass, length) where there are both."""
    found = {}
    for case, speed in speeds(rows).items():
        peers = [value for name, value in speed.items() if name not in OWN]
        if OURS in speed and peers:
            found[case] = speed[OURS] / max(peers)
    return found


def over_fa2(rows: Iterable[Row]) -> dict[tuple, float]:
    """Ours over our kernels for Ampere, as `ratios`: what Hopper's own instructions bring."""
    found = speeds(rows).items()
    return {case: x[OURS] / x[FA2_OWN] for case, x in found if {OURS, FA2_OWN} <= set(x)}


def speeds(rows: Iterable[Row]) -> dict[tuple, dict[str, float]]:
    """case -> backend -> TFLOPs/s; a case in which nothing has a time is there too."""
    speeds: dict[tuple, dict[str, float]] = {}
    for row in rows:
        of_case = speeds.setdefault((*row.panel, row.length), {})
        if row.tflops is not None:
            of_case[row.backend] = row.tflops
    return speeds


@dataclass(frozen=True)
class Run:
    """The rows of one pass from one sweep: figures of one run only are compared."""

    rows: list[Row]
    machine: Machine


def newest(measured: Iterable[Measured], of_pass: str) -> Run | None:
    """The last run in which ours has a time."""
    rows = [(row, machine) for row, machine in measured if row.of_pass == of_pass]
    runs = [m for row, m in rows if row.backend == OURS and row.tflops is not None]
    if not runs:
        return None
    last = max(runs, key=lambda machine: machine.date)
    return Run([row for row, machine in rows if machine == last], last)
