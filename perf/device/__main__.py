"""All that a minute on a Hopper GPU should do, one step after the other.

    python -m perf.device --list                         the steps and their time limits
    python -m perf.device --out DIR                      all of them
    python -m perf.device --out DIR --steps accuracy,sweep --budget 500

Each step runs in its own process under its own limit and writes to DIR as it goes; one that fails
or takes too long does not stop the next. Called again with the same DIR, it goes on where it
stopped. Needs a GPU of compute capability 9.0; without one it says so and does nothing else.
"""

import argparse
import signal
import sys
from pathlib import Path

from .runner import Step, run, screen
from .steps import STEPS


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
    if options.out is None and not options.list:
        parser.error("--out DIR is missing")
    return options


def main(argv: list[str] | None = None, table: tuple[Step, ...] = STEPS) -> int:
    options = parse(argv, table)
    if options.list:
        for step in options.steps:
            print(f"{step.name:<12} {step.limit:>4.0f} s  {step.what}")
        return 0
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


if __name__ == "__main__":
    sys.exit(main())
