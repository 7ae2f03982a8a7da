"""`--run`: the inspected kernel on the emulator, for a small case, with counters and a timeline."""

import argparse
import sys
from pathlib import Path

import torch

from ..call.options import Options
from ..call.scales import NO_DESCALES
from ..emulator import options, profile
from ..emulator.profiling import LaunchProfile
from ..kernels.bwd_config import DELTA_DEPTH
from ..kernels.bwd_signature import BwdSignature
from ..launch import counters, jit
from ..ops import NO_LENGTHS, WHOLE
from .call import Call, Lengths

NUM_CTAS = 132  # at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", action="store_true", help="on the emulator: print its counters")
    parser.add_argument("--seqlen-q", type=int, default=256, help="of --run (%(default)s)")
    parser.add_argument("--seqlen-k", type=int, default=1024, help="of --run (%(default)s)")
    parser.add_argument("--heads", type=int, default=1, help="of --run (%(default)s)")
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE.json|FILE.png",
        help="of --run, in nominal time: a trace for https://ui.perfetto.dev or a picture of CTA 0",
    )


def lengths_of(args: argparse.Namespace) -> Lengths:
    """Raises ValueError for what cannot be run."""
    for name in ("seqlen_q", "seqlen_k", "heads"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(args, name)}, expected at least 1")
    if args.timeline and args.timeline.suffix not in (".json", ".png"):
        raise ValueError(f"--timeline {args.timeline}: expected a name that ends in .json or .png")
    return Lengths(args.seqlen_q, args.seqlen_k, args.heads)


def run(inspection, call: Call, lengths: Lengths) -> LaunchProfile:
    """Needs the emulator installed before anything was compiled."""
    if call.is_backward:
        return _run_backward(call, lengths)
    problem = call.problem(lengths)
    if problem.signature != inspection.signature:
        raise ValueError(f"{lengths} needs another kernel: {problem.signature}")
    (q, k, v), descales = call.tensors(lengths)
    out = torch.empty(problem.out_shape, dtype=problem.out_dtype, device="cpu")
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device="cpu")
    views = problem.scales.views(q.device, *descales) if problem.scales else NO_DESCALES
    sinks = lse.new_zeros(problem.lse_shape[:2]) if problem.has_sink else None
    what = inspection.kernel.where, inspection.signature, inspection.config
    kernel = jit.compile(*what, "emulator", inspection.target.arch)
    is_dynamic = inspection.config.is_dynamic(inspection.signature)
    counter = counters.of(q.device)() if is_dynamic else None
    schedule = counter, *problem.scalars, NUM_CTAS, *WHOLE
    with profile() as found, options(progress=_show):
        kernel((q, k, v, out, lse, *views, sinks, *NO_LENGTHS, *schedule))
    return found.launches[-1]


def _run_backward(call: Call, lengths: Lengths) -> LaunchProfile:
    """The launch with the matrix products; FA3_CPU is `emulate`."""
    qkv, _ = call.tensors(lengths)
    *named, _ = zip(Options._fields, call.options, strict=True)  # rows are queries
    given = dict(named)
    out, lse = torch.ops.fa3.forward(*qkv, **given)
    generator = torch.Generator(out.device).manual_seed(1)
    numbers = torch.randn(out.shape, dtype=torch.float32, device=out.device, generator=generator)
    dout = numbers.to(out.dtype)
    with profile() as found, options(progress=_show):
        torch.ops.fa3.backward(dout, *qkv, out, lse, **given, deterministic=call.is_deterministic)
    return max(found.launches, key=lambda launch: launch.total.flops)


def _show(done: int, total: int) -> None:
    """Progress of a launch on stderr: in place on a terminal, else a line per tenth."""
    text = f"emulated {done} of {total} CTAs"
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or 10 * done // total > 10 * (done - 1) // total:
        print(text, file=sys.stderr, flush=True)


def title_of(inspection) -> str:
    """What a timeline shows."""
    s, c = inspection.signature, inspection.config
    return (
        f"{s.dtype}, head dim {s.head_dim}, {c.num_mma_warpgroups} consumer warpgroups, "
        f"{c.tile_m} queries x {c.tile_n} keys, {c.num_stages} stages: nominal times of the "
        "emulator, not measured"
    )


def names_of(launch: LaunchProfile, is_backward: bool = False) -> dict[str, str]:
    """Names that a person knows for the events of a kernel.

    Products of one shape have one name.
    """
    if is_backward:
        return _names_of_backward(launch)
    found = {}
    loads = {e.name for e in launch.events if e.kind == "load"}
    parameters = sorted(loads, key=lambda name: int(name.split()[-1]))
    found.update(zip(parameters, "QKV", strict=True))
    for e in launch.events:
        if e.kind == "mma":
            found[e.name] = "Q K\u1d40" if "shared memory" in e.name else "P V"
    return found


def _names_of_backward(launch: LaunchProfile) -> dict[str, str]:
    loads = {e.name for e in launch.events if e.kind == "load"}
    boxes = sorted((x for x in loads if "parameter" in x), key=lambda x: int(x.split()[-1]))
    found = dict(zip(boxes, ("Q", "K", "V", "dO"), strict=True))
    found |= {name: "lse, delta" for name in loads - found.keys()}
    return found | _products_of_backward([e.name for e in launch.events if e.kind == "mma"])


def _products_of_backward(events: list[str]) -> dict[str, str]:
    """Each warpgroup makes S and dP before any other product, and these two are alike, but for a
    k-step or more operands of dP where that is less delta.

    Where warpgroups split the products all have the keys as columns, and as many instructions make
    dK as S, or dV as dP: head dims that are not alike tell the two apart.
    """
    of_scores, found = events[0], {}
    different = list(dict.fromkeys(events))
    if len(different) == 3 and len({x.rsplit("x", 1)[0] for x in different}) == 1:
        return dict(zip(different, ("S, dK", "dP, dV", "dQ"), strict=True))
    of_dp = next((x for x in different if _is_less_delta(x, of_scores)), of_scores)
    others = {x for x in different if "registers" not in x} - {of_scores, of_dp}
    for name in different:
        words = ["S\u1d40"] * (name == of_scores) + ["dP\u1d40"] * (name == of_dp)
        if "registers" in name:
            words = ["dV, dK"]
        elif not words:
            words = ["dQ"] if any("registers" in x for x in events) else ["dV, dK, dQ"]
        elif name == of_scores and not others:
            words += ["dQ"]
        found[name] = ", ".join(words)
    return found


def _is_less_delta(name: str, of_scores: str) -> bool:
    """Of products of more than one kind, or with a k-step more than the scores."""
    if name.endswith("wgmmas"):
        return True
    (rows, columns, depth), scores = (x.split(",")[0].split("x") for x in (name, of_scores))
    return [rows, columns, str(int(depth) - DELTA_DEPTH)] == scores


def write_timeline(inspection, launch: LaunchProfile, path: Path, **stretch) -> None:
    """A trace, or a picture of CTA 0; stretch: its start and end in nominal cycles."""
    names = names_of(launch, isinstance(inspection.signature, BwdSignature))
    if path.suffix == ".png":
        launch.write_png(path, labels=names, title=title_of(inspection), **stretch)
    else:
        launch.write_trace(path, labels=names)
