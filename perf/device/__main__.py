"""All that a minute on a Hopper GPU should do, one step after the other.

    python -m perf.device --list                         the steps and their time limits
    python -m perf.device --size                         what travels with the tree
    python -m perf.device --out DIR                      all of them
    python -m perf.device --out DIR --steps accuracy,sweep --budget 500

Each step runs in its own process under its own limit and writes to DIR as it goes; one that fails
or takes too long does not stop the next. Called again with the same DIR, it goes on where it
stopped. Needs a GPU of compute capability 9.0; without one it says so and does nothing else.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from .runner import ROOT, Step, run, screen
from .steps import STEPS

CARRIED = ".device"  # folder of packages for a machine that fetches nothing; git ignores it
MOST_BYTES = 64 << 20


def parse(argv: list[str] | None, table: tuple[Step, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m perf.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the results")
    add("--steps", default=",".join(step.name for step in table), metavar="A,B")
    add("--list", action="store_true", help="print the steps and do nothing else")
    add("--size", action="store_true", help="print what travels with the tree; 1 if too much")
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="for all steps")
    add("--again", action="store_true", help="do finished steps again")
    add("--archive", type=Path, metavar="FILE", help="a .tar.gz of DIR, renewed after every step")
    add("--commit", help="of this tree, where git cannot tell (default: what git says)")
    options = parser.parse_args(argv)
    by_name = {step.name: step for step in table}
    asked = options.steps.split(",")
    for name in asked:
        if name not in by_name:
            parser.error(f"--steps: there is no {name!r}, only {', '.join(by_name)}")
    options.steps = [step for name, step in by_name.items() if name in asked]
    if options.out is None and not (options.list or options.size):
        parser.error("--out DIR is missing")
    return options


def main(argv: list[str] | None = None, table: tuple[Step, ...] = STEPS) -> int:
    options = parse(argv, table)
    if options.list:
        for step in options.steps:
            print(f"{step.name:<12} {step.limit:>4.0f} s  {step.what}")
        return 0
    if options.size:
        return travels(ROOT)
    from ..sweep import commit, hopper  # imports torch, which --list does without

    if not hopper():
        print(
            "perf.device: there is no GPU of compute capability 9.0 here, "
            "so nothing was measured or written."
        )
        return 0
    if options.commit is None:
        options.commit = commit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the step's process along
    try:
        outcomes = run(
            options.steps,
            options.out.resolve(),
            options.budget,
            options.commit,
            options.again,
            options.archive,
        )
    except ValueError as error:
        print(f"perf.device: {error}", file=sys.stderr)
        return 2
    print(f"\ncommit {options.commit}, results in {options.out}\n\n{screen(outcomes)}")
    return 0 if all(outcome.status in ("ok", "skipped") for outcome in outcomes.values()) else 1


def travels(root: Path) -> int:
    """Print the bytes of the tree and of what is taken along; 1 where they are too many."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    tree = sum((root / name).stat().st_size for name in listed if (root / name).is_file())
    along = sum(path.stat().st_size for path in (root / CARRIED).rglob("*") if path.is_file())
    total = tree + along
    verdict = "too much" if total > MOST_BYTES else "fits"
    print(
        f"tree {tree / 2**20:.1f} MiB, {CARRIED} {along / 2**20:.1f} MiB, together "
        f"{total / 2**20:.1f} of {MOST_BYTES >> 20} MiB: {verdict}"
    )
    return int(total > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
