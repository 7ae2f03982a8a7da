"""`python -m fa3 predict FILE.cubin ...`: the speed of the attention kernels in cubins.

Of kernels for 8.x a bound, which the options do not change.
"""

import argparse
import functools
import sys
from dataclasses import fields, replace
from pathlib import Path

from ..report import analyse
from . import whatif
from .ampere import GPUS, Bound
from .machine import CLOCK, TAIL, Machine
from .predict import Settings, predict_report
from .producer import AHEAD, WARPS
from .report import text, timeline
from .simulate import ITERATIONS


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("cubin", nargs="+", type=Path)
    p.add_argument("--kernel", help="its full name, where a cubin holds several with MMAs")
    p.add_argument("--clock", type=float, default=CLOCK, help="GHz (%(default)s)")
    p.add_argument("--tail", type=float, default=TAIL, help="share of steady time (%(default)s)")
    p.add_argument("--consumers", type=int, help="warpgroups (all of the launch but one)")
    p.add_argument("--iterations", type=int, default=ITERATIONS, help="simulated (%(default)s)")
    p.add_argument("--timeline", action="store_true", help="draw two iterations")
    p.add_argument("--rivals", action="store_true", help="predict with the rival constants too")
    p.add_argument("--trace", action="store_true", help="print the instructions of one iteration")
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a constant of the machine"
    )
    p.add_argument(
        "--transposers",
        type=int,
        default=WARPS,
        help="warps that transpose V (%(default)s); 0: what if it came transposed",
    )
    p.add_argument(
        "--ahead", type=int, default=AHEAD, help="blocks of V they may be ahead (%(default)s)"
    )
    p.add_argument(
        "--rescale-always",
        action="store_true",
        help="execute blocks that the steady state jumps over, in every iteration",
    )
    p.add_argument("--drop-rescale", action="store_true", help="what if: no FMULs that rescale O")
    p.add_argument(
        "--emulate-ex2",
        type=float,
        metavar="F",
        help="what if: this fraction of MUFU.EX2 becomes 7 FMA and 2 ALU instructions",
    )
    p.add_argument("--no-barriers", action="store_true", help="what if: no named barriers")


def machine(changes: list[str]) -> Machine:
    """The default machine with NAME=VALUE changes; raises ValueError for an unknown name."""
    types = {field.name: type(field.default) for field in fields(Machine)}
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in types:
            raise ValueError(f"--set {change}: the machine has no {name!r}, it has {list(types)}")
        values[name] = types[name](float(value))
    return replace(Machine(), **values)


def settings(args: argparse.Namespace) -> Settings:
    edits = []
    if args.drop_rescale:
        edits.append(whatif.drop_rescale)
    if args.emulate_ex2:
        edits.append(functools.partial(whatif.emulate_ex2, fraction=args.emulate_ex2))
    if args.no_barriers:
        edits.append(whatif.no_barriers)
    return Settings(
        machine=machine(args.set),
        clock=args.clock,
        tail=args.tail,
        iterations=args.iterations,
        consumers=args.consumers,
        transposers=args.transposers,
        ahead=args.ahead,
        rescale_always=args.rescale_always,
        edits=tuple(edits),
    )


def run(args: argparse.Namespace) -> int:
    try:
        chosen = settings(args)
        for path in args.cubin:
            report = analyse(path.read_bytes(), args.kernel)
            capability = divmod(report.resources.sm, 10)
            if capability in GPUS:
                print("\n".join(Bound.of(report, capability, bool(report.beside)).lines()))
                continue
            prediction = predict_report(report, chosen)
            if args.trace:
                for x in prediction.traces[-1]:
                    c = x.control
                    print(f"  S{c.stall:02} W{c.write_barrier} R{c.read_barrier} "
                          f"B{c.wait:06b}  {x.text}")  # fmt: skip
            print(text(prediction))
            if args.rivals:
                rates = ", ".join(f"{rate:.0f}" for rate in prediction.rivals())
                print(f"  rival constants: {rates}")
            if args.timeline:
                print(timeline(prediction.result, len(prediction.traces)))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fa3 predict: {error}", file=sys.stderr)
        return 1
    return 0
