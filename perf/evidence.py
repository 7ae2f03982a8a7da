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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from .backends import OURS
from .cases import DTYPES
from .check import attention, visible_keys
from .progress import track
from .results import RESULTS, ROOT, Row, read_all
from .sweep import commit

DOCUMENT = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- begin: python -m perf.evidence -->", "<!-- end -->"
SIXTEEN_BIT = ("bf16", "fp16")
MASKS = ("full", "causal", "local")
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


@dataclass(frozen=True)
class Variant:
    head_dim: int
    head_dim_v: int
    dtype: str
    mask: str

    def __str__(self) -> str:
        dims = {self.head_dim: None, self.head_dim_v: None}
        return f"{'/'.join(map(str, dims))} {self.dtype} {self.mask}"


def variants() -> list[Variant]:
    """Every row of the tuning table, by dtype and mask."""
    from fa3 import tuning

    return [
        Variant(*dims, t, m) for dims in sorted(tuning.FORWARD) for t in SIXTEEN_BIT for m in MASKS
    ]


def compiled(variant: Variant) -> tuple[str, str, str, str]:
    """Compile for sm_90a and read the SASS: tile, stages, local memory in bytes, slots per exp.

    The slots are those of the steady main loop, per exponential of one thread.
    """
    from fa3 import dispatch, inspect, jit, tuning
    from fa3.kernels.signature import Signature

    signature = Signature(variant.dtype, variant.head_dim, variant.head_dim_v, variant.mask)
    config = tuning.forward(signature)
    kernel = dispatch.forward(signature, dispatch.target_of(torch.device("cpu")))
    report = inspect.analyse(jit.artifacts(kernel.where, signature, config).cubin)
    if report.serialised:
        raise RuntimeError(f"{variant}: ptxas runs its warpgroup MMAs one by one")
    slots = f"{report.steady.straight.per_exponential:.2f}" if report.steady else "-"
    tile = f"{config.tile_m} x {config.tile_n}"
    return tile, str(config.num_stages), str(report.resources.frame), slots


def emulated(variant: Variant) -> tuple[float, float]:
    """Run on the emulator with all checks: the largest errors against fp32, ours and torch's own.

    torch's is that of the same formula with every step in the variant's dtype.
    """
    import fa3

    torch.manual_seed(0)
    left, right = {"full": (-1, -1), "causal": (-1, 0), "local": WINDOW}[variant.mask]
    s_q, s_k, heads = 250, 333, 2
    q = torch.randn(1, s_q, heads, variant.head_dim)
    k = torch.randn(1, s_k, heads, variant.head_dim)
    v = torch.randn(1, s_k, heads, variant.head_dim_v)
    q, k, v = (x.to(DTYPES[variant.dtype]) for x in (q, k, v))
    with fa3.emulator.options(checks=fa3.emulator.ALL_CHECKS):
        out = fa3.flash_attn_func(
            q, k, v, causal=variant.mask == "causal", window_size=(left, right)
        )
    seen = visible_keys(s_q, s_k, left, right)
    heads_first = [x[0].transpose(0, 1) for x in (q, k, v)]
    exact = attention(*(x.float() for x in heads_first), seen)
    plain = attention(*heads_first, seen)
    ours = (out[0].transpose(0, 1).float() - exact).abs().max().item()
    torchs = (plain.float() - exact).abs().max().item()
    if not ours <= 2 * torchs:
        raise RuntimeError(f"{variant}: largest error {ours:.2g}, torch's own is {torchs:.2g}")
    return ours, torchs


def measured(variant: Variant, folder: Path = RESULTS) -> tuple[str, str]:
    """(device and date, TFLOPs/s and length) of the newest sweep at the longest length."""
    found = [(row, machine) for row, machine in read_all(folder) if _is_of(row, variant)]
    if not found:
        return NOT_MEASURED, NOT_MEASURED
    row, machine = max(found, key=lambda pair: (pair[0].length, pair[1].date))
    return f"{machine.device}, {machine.date[:10]}", f"{row.tflops:.0f} at {row.length}"


def _is_of(row: Row, variant: Variant) -> bool:
    mask = "causal" if row.causal else "full"
    of_variant = variant.dtype, variant.head_dim, variant.head_dim_v, variant.mask
    measured = row.backend == OURS and row.tflops is not None
    return measured and (row.dtype, row.head_dim, row.head_dim, mask) == of_variant


def rows():
    """A table row per variant; whatever fails ends the run."""
    for variant in track(variants(), "variant"):
        ours, torchs = emulated(variant)
        read = compiled(variant)
        yield (str(variant), *read, f"{ours:.1e}", f"{torchs:.1e}", *measured(variant))


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
