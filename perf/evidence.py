"""Rewrite the table of docs/evidence.md from what this machine does now: compile, run, compare.

    python -m perf.evidence            every kernel variant, some minutes on two cores
    python -m perf.evidence --check    compile and run, but leave the document alone

A variant is a row of fa3/tuning.py, a dtype and a mask. Each is compiled for sm_90a, its SASS is
read, and it runs on the CPU emulator with all checks on, against fp32. The GPU columns come from
perf/results/*.csv, which perf.sweep wrote on a GPU; a variant without a line there is not measured.
"""

import argparse
import datetime
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from fa3.kernels.signature import Signature

from .backends import OURS
from .cases import DTYPES
from .check import attention, visible_keys
from .progress import track
from .results import RESULTS, ROOT, Row, read_all
from .sweep import commit
from .variants import name_of, sixteen_bit

DOCUMENT = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- begin: python -m perf.evidence -->", "<!-- end -->"
WINDOW = (100, 30)  # of the variants with a local mask
NOT_MEASURED = "not measured"
COLUMNS = (
    "variant",
    "tile",
    "stages",
    "local memory",
    "slots per exp",
    "emulator, max error",
    "torch's max error",
    "Hopper GPU",
    "TFLOPs/s",
)


def compiled(signature: Signature) -> tuple[str, str, str, str]:
    """Compile for sm_90a and read the SASS: tile, stages, local memory in bytes, slots per exp.

    The slots are those of the steady main loop, per exponential of one thread.
    """
    from fa3.inspect.cli import inspect

    found = inspect(signature)
    config, report = found.config, found.report
    if report.serialised:
        raise RuntimeError(f"{name_of(signature)}: ptxas runs its warpgroup MMAs one by one")
    slots = f"{report.steady.straight.per_exponential:.2f}" if report.steady else "-"
    tile = f"{config.tile_m} x {config.tile_n}"
    return tile, str(config.num_stages), str(report.resources.frame), slots


def emulated(signature: Signature) -> tuple[float, float]:
    """Run on the emulator with all checks: the largest errors against fp32, ours and torch's own.

    torch's is that of the same formula with every step in the variant's dtype.
    """
    import fa3

    torch.manual_seed(0)
    left, right = {"full": (-1, -1), "causal": (-1, 0), "local": WINDOW}[signature.mask]
    s_q, s_k, heads = 250, 333, 2
    q = torch.randn(1, s_q, heads, signature.head_dim)
    k = torch.randn(1, s_k, heads, signature.head_dim)
    v = torch.randn(1, s_k, heads, signature.head_dim_v)
    q, k, v = (x.to(DTYPES[signature.dtype]) for x in (q, k, v))
    with fa3.emulator.options(checks=fa3.emulator.ALL_CHECKS):
        out = fa3.flash_attn_func(
            q, k, v, causal=signature.mask == "causal", window_size=(left, right)
        )
    seen = visible_keys(s_q, s_k, left, right)
    heads_first = [x[0].transpose(0, 1) for x in (q, k, v)]
    exact = attention(*(x.float() for x in heads_first), seen)
    plain = attention(*heads_first, seen)
    ours = (out[0].transpose(0, 1).float() - exact).abs().max().item()
    torchs = (plain.float() - exact).abs().max().item()
    if not ours <= 2 * torchs:
        name = name_of(signature)
        raise RuntimeError(f"{name}: largest error {ours:.2g}, torch's own is {torchs:.2g}")
    return ours, torchs


def measured(signature: Signature, folder: Path = RESULTS) -> tuple[str, str]:
    """(device and date, TFLOPs/s and length) of the newest sweep at the longest length."""
    found = [(row, machine) for row, machine in read_all(folder) if _is_of(row, signature)]
    if not found:
        return NOT_MEASURED, NOT_MEASURED
    row, machine = max(found, key=lambda pair: (pair[0].length, pair[1].date))
    return f"{machine.device}, {machine.date[:10]}", f"{row.tflops:.0f} at {row.length}"


def _is_of(row: Row, signature: Signature) -> bool:
    mask = "causal" if row.causal else "full"
    wanted = signature.dtype, signature.head_dim, signature.head_dim_v, signature.mask
    is_timed = row.backend == OURS and row.tflops is not None
    return is_timed and (row.dtype, row.head_dim, row.head_dim, mask) == wanted


def rows():
    """A table row per variant; whatever fails ends the run."""
    for signature in track(sixteen_bit(), "variant"):
        ours, torchs = emulated(signature)
        read = compiled(signature)
        errors = f"{ours:.1e}", f"{torchs:.1e}"
        yield (name_of(signature), *read, *errors, *measured(signature))


def markdown(table_rows, made: str) -> str:
    rules = ["---"] * len(COLUMNS)
    return "\n".join([BEGIN, "", made, "", *map(_line, (COLUMNS, rules, *table_rows)), "", END])


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def insert(document: str, table: str) -> str:
    """The document with `table` between its two marks; ValueError where a mark is missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no table between {BEGIN!r} and {END!r}")
    return before + table + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    os.environ["FA3_CPU"] = "emulate"
    table_rows = list(rows())
    made = (
        f"{datetime.date.today()}, commit {commit()}: nvidia-cutlass-dsl "
        f"{version('nvidia-cutlass-dsl-libs-base')}, torch {torch.__version__}."
    )
    table = markdown(table_rows, made)
    if options.check:
        print(table)
    else:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), table))
        print(f"{len(table_rows)} variants, written: {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
