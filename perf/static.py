"""What can be read of every shipped kernel without a GPU, kept beside what it was.

    python -m perf.static            compile all of them, rewrite tests/golden/static.json
    python -m perf.static e4m3       only those with these words in their names, the others stay
    python -m perf.static --check    compile all of them, name what became worse
    python -m perf.static --spills   compile each config of Ampere with each mask, name what spills

tests/test_static.py compares every kernel with its line there, so that a change that makes a main
loop worse is seen, and what it costs stands in the change's diff.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fa3.inspect.cli import Inspection, inspect

from . import variants
from .progress import track
from .results import ROOT

TABLE = ROOT / "tests" / "golden" / "static.json"
SLACK = 1.002  # of slots per exponential: a move or two of the register allocation


@dataclass(frozen=True)
class Line:
    """One kernel; less is better in every field but `config`."""

    config: str
    registers: int  # of a thread at launch
    local_bytes: int  # of a thread: spills and local arrays
    smem_bytes: int  # of a CTA
    slots_per_exp: float  # of the steady loop's straight way
    slots_with_all: float  # with what that way may leave out, or leaves the loop for

    @classmethod
    def of(cls, found: Inspection) -> "Line":
        report, resources = found.report, found.report.resources
        return cls(
            config=variants.as_code(found.config),
            registers=resources.registers,
            local_bytes=resources.frame,
            smem_bytes=resources.static_smem + found.smem_bytes,
            slots_per_exp=round(report.slots_per_exponential, 3),
            slots_with_all=round(report.slots_with_all, 3),
        )


def worse(committed: Line, found: Line) -> list[str]:
    """What became worse; another config has nothing to be compared with."""
    if committed.config != found.config:
        return [f"config: {found.config}, committed {committed.config}"]
    names = ("registers", "local_bytes", "smem_bytes", "slots_per_exp", "slots_with_all")
    return [
        f"{name}: {getattr(found, name)}, committed {getattr(committed, name)}"
        for name in names
        if getattr(found, name) > getattr(committed, name) * (SLACK if "slots" in name else 1)
    ]


def kernels() -> list[variants.Variant]:
    """All of the table."""
    back = variants.backward() + variants.backward_with_options()
    forward = variants.compared() + variants.with_scores() + variants.of_caches()
    of_ampere = variants.ampere() + variants.ampere_backward()
    return [*map(variants.Variant, forward), *back, *of_ampere]


def read(path: Path = TABLE) -> dict[str, Line]:
    return {name: Line(**line) for name, line in json.loads(path.read_text()).items()}


def write(lines: dict[str, Line], path: Path = TABLE) -> None:
    text = json.dumps({name: asdict(line) for name, line in lines.items()}, indent=1)
    path.write_text(f"{text}\n")


def named(names: Iterable[str], words: Iterable[str]) -> list[str]:
    """Those with all of the words."""
    return [name for name in names if set(words) <= set(re.split(r"[ ,]+", name))]


def spilling(words: Iterable[str]) -> list[str]:
    """Names of kernels of Ampere that have local memory; all of it comes from spills there."""
    by_name, found = {variant.name: variant for variant in variants.every_ampere()}, []
    for name in track(named(by_name, words), "kernel"):
        variant = by_name[name]
        local = inspect(variant.signature, target=variant.target).report.resources.frame
        if local:
            found.append(name)
            print(f"{name}: {local} bytes of local memory per thread")
    return found


def main(argv: list[str] | None = None, path: Path = TABLE) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names: only these")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if any is worse")
    parser.add_argument(
        "--spills", action="store_true", help="of Ampere; write nothing, as --check"
    )
    options = parser.parse_args(argv)
    if options.spills:
        return 1 if spilling(options.words) else 0
    committed = read(path) if path.is_file() else {}
    by_name = {variant.name: variant for variant in kernels()}
    chosen = named(by_name, options.words)
    found, losses = {}, 0
    for name in track(chosen, "kernel"):
        variant = by_name[name]
        found[name] = Line.of(inspect(variant.signature, target=variant.target))
        for loss in worse(committed[name], found[name]) if name in committed else ():
            losses += 1
            print(f"{name}: {loss}")
    if options.check:
        return 1 if losses else 0
    lines = committed | found
    write({name: lines[name] for name in by_name if name in lines}, path)
    print(f"{len(found)} kernels, {losses} losses; written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
