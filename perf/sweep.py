"""Attention's speed beside other kernels, in the setting of the FlashAttention-3 paper.

    python -m perf.sweep                          bf16 and FP8, head dims 64 128 256, 512 to 16k
    python -m perf.sweep --head-dims 128 --lengths 1024 16384 --causal no --dtype bf16 fp16
    python -m perf.sweep --passes backward "forward and backward"

16k tokens in all, hidden size 2048, random normal inputs. e4m3: all backends get the same numbers,
which bf16 holds as well; quantising is not timed. Gradients are those of autograd, their operations
2.5 times the forward pass's, with it 3.5. Every backend's results are first compared
with fp32; then all backends and a large matrix product are timed in interleaved rounds, each call
with a cold L2. Prints a table, writes a CSV file and a PNG chart. Needs a CUDA GPU; without one it
says so and does nothing else.
"""

import argparse
import datetime
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import check, timing
from .backends import BACKENDS, Absent, Call, Prepare, Scaled, gradients
from .cases import DTYPES, HEAD_DIMS, LENGTHS, PASSES, Case, flops, paper_cases
from .charts import write_chart
from .progress import track
from .report import table
from .results import ROOT, SWEEP, Machine, Row, names, write_csv

CAUSAL = {"no": (False,), "yes": (True,), "both": (False, True)}
QUICK = {"lengths": [1024, 16_384], "rounds": 2}
WARM_UP_SECONDS = 3.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m perf.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS), metavar="D")
    add("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="N")
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "e4m3"])
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    add("--causal", choices=CAUSAL, default="both")
    backends = list(dict.fromkeys(name for of_pass in BACKENDS.values() for name in of_pass))
    add("--backends", nargs="+", choices=backends, default=backends)
    add("--rounds", type=int, default=5, help="interleaved rounds of each case (default 5)")
    add("--out", type=Path, default=ROOT / "perf" / "out", help="folder of the CSV and the chart")
    add("--quick", action="store_true", help="two lengths and two rounds")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    for option in ("head_dims", "lengths"):
        if min(getattr(options, option)) < 1:
            parser.error(f"--{option.replace('_', '-')} must be positive")
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not torch.cuda.is_available():
        print("perf.sweep: there is no CUDA GPU here, so nothing was measured or written.")
        return 0
    machine = this_machine()
    stem = f"{SWEEP}-{machine.date.replace(':', '')}"
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for new in sweep(options):
        rows += new
        write_csv(options.out / f"{stem}.csv", rows, machine)
    print(f"{machine.device}, driver {machine.driver}, {machine.date}, commit {machine.commit}\n")
    print(table(rows, bold=sys.stdout.isatty()))
    print(f"\nwritten: {options.out / stem}.csv")
    if not names(rows):
        return 1
    write_chart(options.out / f"{stem}.png", rows, machine)
    print(f"written: {options.out / stem}.png")
    return 0


def sweep(options: argparse.Namespace):
    """The rows of one case after the other, behind a progress bar."""
    grid = options.dtype, options.head_dims, CAUSAL[options.causal], options.lengths
    cases = paper_cases(*grid, options.passes)
    sample = timing.GpuTimer()
    products = {name: timing.matmul_call(DTYPES[name]) for name in options.dtype}
    timing.warm_up(products[options.dtype[0]][0], WARM_UP_SECONDS)
    for case in track(cases, "case"):
        of_pass = BACKENDS[case.of_pass].items()
        backends = {name: prepare for name, prepare in of_pass if name in options.backends}
        yield run_case(case, backends, products[case.dtype], options.rounds, sample)


def run_case(
    case: Case,
    backends: dict[str, Prepare],
    product: tuple[Callable[[], object], float],
    rounds: int,
    sample: timing.Sample,
    device: str = "cuda",
) -> list[Row]:
    """Check, then time every backend on one case; product: a matrix product and its operations."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(case.shape, device=device).to(DTYPES[case.dtype]) for _ in range(3))
    expected = exact(case, q, k, v)
    calls, errors, notes = {}, {}, {}
    for name, prepare in backends.items():
        try:
            calls[name], errors[name] = admit(case, prepare, (q, k, v), expected)
        except Exception as error:  # one backend's failure is a line of the report
            notes[name] = reason(error)
    del expected

    multiply, operations = product
    times = timing.interleave({**calls, "matmul": multiply}, rounds, sample)
    ceiling = operations / statistics.median(times["matmul"]) / 1e9
    clocks = clocks_under_load(multiply) if device == "cuda" else {}
    rows = []
    for name in backends:
        if name not in calls:
            rows.append(Row.of(case, name, note=notes[name]))
            continue
        low, middle, high = statistics.quantiles(times[name], n=4)
        speed = flops(case) / middle / 1e9
        rows.append(
            Row.of(
                case,
                name,
                ms=middle,
                ms_low=low,
                ms_high=high,
                tflops=speed,
                matmul_tflops=ceiling,
                percent_of_matmul=100 * speed / ceiling,
                row_error=errors[name],
                **clocks,
            )
        )
    return rows


def exact(case: Case, q, k, v):
    """What a call should give, in fp32."""
    if case.gradients:
        return check.exact_gradients(case, q, k, v, gradients.upstream(q))
    return check.exact(case, q, k, v)


def admit(case: Case, prepare: Prepare, qkv, expected) -> tuple[Call, float]:
    """The backend's call and its error; raises where the results are not right."""
    call = prepare(case, *qkv)
    out = call()
    if case.gradients:
        error = check.gradient_error(out, expected)
        if error > check.GRADIENT_ERROR[case.dtype]:
            raise ValueError(f"wrong gradients at {case}: a row is off by {error:.2g}")
        return call, error
    shape = out.values.shape if isinstance(out, Scaled) else out.shape
    if shape != expected.shape:
        raise ValueError(f"wrong shape {tuple(shape)}, expected {tuple(expected.shape)}")
    error = check.row_error(out, expected)
    if error > check.ROW_ERROR[case.dtype]:
        raise ValueError(f"wrong output at {case}: a row is off by {error:.2g} of its length")
    return call, error


def reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, Absent):
        text = f"{type(error).__name__}: {text}"
    return text[:200]


def hopper() -> bool:
    """There is a GPU that can run the kernels."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def this_machine() -> Machine:
    driver = nvidia_smi("driver_version")
    return Machine(
        device=torch.cuda.get_device_name(),
        driver=driver[0] if driver else "unknown",
        torch=torch.__version__,
        dsl=importlib.metadata.version("nvidia-cutlass-dsl-libs-base"),
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    )


def commit() -> str:
    """The short commit of this tree, with -dirty where it was changed since.

    FA3_COMMIT names it where the tree came without its history.
    """
    if named := os.environ.get("FA3_COMMIT"):
        return named
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def nvidia_smi(fields: str, during: Callable[[], object] | None = None) -> list[str]:
    """The current GPU's fields; empty where nvidia-smi is missing. during() keeps the GPU busy."""
    if shutil.which("nvidia-smi") is None:
        return []
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    command.append(f"--id=GPU-{uuid.removeprefix('GPU-')}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while during is not None and process.poll() is None:
            during()
            torch.cuda.synchronize()
        output = process.communicate()[0]
    return [value.strip() for value in output.split(",")] if process.returncode == 0 else []


def clocks_under_load(call: Callable[[], object]) -> dict[str, int]:
    values = nvidia_smi("clocks.sm,clocks.mem", during=call)
    if len(values) != 2 or not all(value.isdigit() for value in values):
        return {}
    return {"sm_mhz": int(values[0]), "memory_mhz": int(values[1])}


if __name__ == "__main__":
    sys.exit(main())
