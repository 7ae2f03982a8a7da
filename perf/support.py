"""Rewrite the tables of docs/support.md from what calls are accepted or refused.

    python -m perf.support            some seconds; needs no GPU
    python -m perf.support --check    print the tables, write nothing

Every cell is a set of calls, made as `python -m fa3 warm` makes them: nothing is compiled, and what
is refused is refused by the public functions themselves.
"""

import argparse
import itertools
import sys
from functools import cache

from fa3 import warm
from fa3.inspect import cli
from fa3.launch import dispatch

from .document import insert, table
from .results import ROOT

DOCUMENT = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- begin: python -m perf.support -->", "<!-- end -->"
TARGETS = {
    **cli.TARGETS,
    **{
        f"sm_{major}{minor}": dispatch.Target("gpu", "a GPU", (major, minor), 132)
        for major, minor in dispatch.NEWER
    },
}
# Head dims of q and k, and of v: a pair of each row of the tuning tables, and odd ones.
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256), (80, 32))
# A row: its name, and its options.
ROWS = {
    "fp16 and bf16, forward": "--dtype fp16 bf16",
    "e4m3, scales per head, forward": "--dtype e4m3 --scales head",
    "e4m3, scales per block, forward": "--dtype e4m3 --scales block",
    "int8 q and k, e4m3 v, forward": "--dtype int8 --scales head",
    "fp16 and bf16, backward": "--dtype fp16 bf16 --backward",
    "the same, deterministic": "--dtype fp16 bf16 --backward --deterministic",
}
COLUMNS = {
    "full": "",
    "causal": "--causal",
    "window": "--window 100 20",
    "softcap": "--softcap 30",
    "sinks": "--sinks",
    "packed": "--varlen",
    "split keys": "--splits",
    "dense cache": "--cache",
    "paged cache": "--cache --page-size 64",
}
NOT_OF_BACKWARD = ("split keys", "dense cache", "paged cache")


def accepts(arch: str, row: str, column: str, dims: tuple[int, int]) -> bool:
    """Whether such calls get kernels, and with splits one that splits."""
    line = f"warm --head-dim {dims[0]} --head-dim-v {dims[1]} {ROWS[row]} {COLUMNS[column]}"
    args = cli.arguments(line.split())
    try:
        kernels = warm.wanted(warm.calls_of(args), TARGETS[arch])
    except (NotImplementedError, ValueError):
        return False
    return column != "split keys" or any(
        getattr(kernel.signature, "is_split", False) for kernel in kernels
    )


def cell(arch: str, row: str, column: str) -> str:
    """yes, no, or the head dims that are refused."""
    if column in NOT_OF_BACKWARD and "--backward" in ROWS[row]:
        return "–"
    refused = [dims for dims in HEAD_DIMS if not accepts(arch, row, column, dims)]
    if not refused:
        return "yes"
    if len(refused) == len(HEAD_DIMS):
        return "no"
    return "not " + ", ".join("/".join(map(str, dict.fromkeys(dims))) for dims in refused)


@cache
def rows_of(arch: str) -> tuple[tuple[str, ...], ...]:
    return tuple((row, *(cell(arch, row, column) for column in COLUMNS)) for row in ROWS)


def markdown() -> str:
    """The tables, one for all architectures that have the same."""
    parts = [BEGIN]
    hopper_first = sorted(TARGETS, key=lambda arch: arch != "sm_90a")
    for rows, archs in itertools.groupby(hopper_first, rows_of):
        names = [f"{x[0]}.{x[1]}" for x in (TARGETS[arch].capability for arch in archs)]
        parts += [f"## Compute capability {', '.join(names)}", table(("", *COLUMNS), rows)]
    return "\n\n".join([*parts, END])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m perf.support", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    text = markdown()
    if options.check:
        print(text)
    else:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), text))
        print(f"written: {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
