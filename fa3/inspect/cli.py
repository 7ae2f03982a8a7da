"""`python -m fa3 inspect`: the kernel that a call would get, compiled, read and predicted.

`python -m fa3 predict`, for any cubin, is in `model.cli`. Neither needs a GPU.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from .. import doctor, emulator, warm
from ..emulator.profiling import LaunchProfile
from ..kernels.bwd_config import BwdConfig
from ..kernels.bwd_signature import BwdSignature
from ..kernels.config import SMEM_LIMIT, FwdConfig
from ..kernels.signature import Signature
from ..kernels.sm80.config import RESERVED, SMEM_OF_SM, Sm80Config
from ..launch import dispatch, jit, tuning
from ..launch.jit import Artifacts
from . import run
from .call import DTYPES, Call, add_arguments_of_call
from .model import cli as model_cli
from .model.ampere import Bound
from .model.machine import BANDWIDTH, BYTES_PER_CYCLE
from .model.predict import Prediction, Settings, predict_report
from .model.report import as_dict, summary
from .report import Report, analyse, analyse_rest
from .sass import DisassemblerMissing

TARGETS = {
    arch: dispatch.Target("gpu", f"an {arch} GPU", capability, 132, arch)
    for arch, capability in dispatch.ARCHITECTURES.items()
}
HOPPER = TARGETS["sm_90a"]

AnySignature = Signature | BwdSignature
AnyConfig = FwdConfig | BwdConfig | Sm80Config


@dataclass(frozen=True)
class Inspection:
    """A kernel with all that led to it; of a backward pass the one with the matrix products."""

    signature: AnySignature
    config: AnyConfig
    kernel: dispatch.Kernel
    artifacts: Artifacts
    report: Report
    target: dispatch.Target = HOPPER

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA: what a launch asks for, or up to 1024 bytes more."""
        return self.config.smem_bytes(self.signature)

    @property
    def is_backward(self) -> bool:
        return isinstance(self.signature, BwdSignature)

    @property
    def is_ampere(self) -> bool:
        return self.target.capability[0] == 8

    @cached_property
    def rest(self) -> tuple[Report, ...]:
        """The other kernels that a call launches, in the order of the cubin."""
        return analyse_rest(self.artifacts.cubin, self.report) if self.is_backward else ()

    @cached_property
    def prediction(self) -> Prediction | None:
        """Of the timing model, for a long sequence on an H100; it knows no other GPU."""
        if self.is_ampere:
            return None
        c, flops = self.config, None
        if self.is_backward:
            flops = 2 * c.tile_m * c.tile_n * self.signature.depth
        settings = Settings(consumers=c.num_mma_warpgroups, flops=flops)
        return predict_report(self.report, settings)

    @cached_property
    def bound(self) -> Bound | None:
        """The same of Ampere and Ada, but no more than a bound."""
        if not self.is_ampere:
            return None
        return Bound.of(self.report, self.target.capability, self.is_backward)

    @property
    def stem(self) -> str:
        """File name without a suffix."""
        s = self.signature
        scales = "" if s.quantised is None else f"_{s.quantised.out}_v{s.quantised.v_block}"
        arch = self.target.arch.removesuffix("a").replace("_", "")
        dims = f"d{s.head_dim}_dv{s.head_dim_v}"
        words = [*features(s)]
        kind = "backward" if self.is_backward else "forward"
        return "_".join([kind, arch, s.dtype, dims, f"{s.mask}{scales}", *words])

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "kernel": self.kernel.where,
            "signature": asdict(self.signature),
            "config": asdict(self.config) | {"tile_m": self.config.tile_m},
            "smem_bytes": self.smem_bytes,
            "report": self.report.as_dict(),
            "rest": [report.as_dict() for report in self.rest],
            "prediction": self.bound.as_dict() if self.bound else as_dict(self.prediction),
        }

    def __str__(self) -> str:
        s, c = self.signature, self.config
        lines = [
            f"call              {s.dtype}, head dim {s.head_dim}, of v {s.head_dim_v} (tiles), "
            f"{', '.join([f'mask {s.mask}', *features(s)])}",
            *([f"one-byte inputs   {s.quantised}"] if s.quantised else []),
            f"served by         {self.kernel.name}, {self.kernel.where}",
            f"config            {c}",
            f"tiles             {c.tile_m} query rows x {c.tile_n} key rows",
            f"stages            {c.num_stages} of {self._streamed}",
            self._roles(),
            *self._schedule(),
            f"shared memory     {self.smem_bytes} bytes per CTA at launch, at most; "
            f"the limit is {self._smem_limit()}",
            str(self.report),
            *(self.bound.lines() if self.bound else summary(self.prediction)),
            *self._generation(),
            *map(_beside, self.rest),
        ]
        return "\n".join(lines)

    @property
    def _streamed(self) -> str:
        return "Q and of dO" if self.is_backward else "K and of V"

    def _generation(self) -> list[str]:
        """Of kernels for caches: what a block of keys takes to arrive."""
        s = self.signature
        if self.prediction is None or self.is_backward or not (s.page_rows or s.is_split):
            return []
        size = 1 if s.widens or s.quantised else 2
        moved = size * self.config.tile_n * (s.head_dim + s.head_dim_v)
        arrival, cycles = moved / BYTES_PER_CYCLE, self.prediction.cycles
        bound = "memory" if arrival > cycles else "the loop"
        return [
            f"generation        a block of {self.config.tile_n} keys has {moved} bytes, which take "
            f"{arrival:.0f} cycles to",
            f"                  arrive at {BANDWIDTH / 1e12} TB/s, the loop {cycles:.0f}: bound by "
            f"{bound}",
        ]

    def _roles(self) -> str:
        c = self.config
        if isinstance(c, Sm80Config):
            rows, ctas = c.rows_per_warp, c.ctas_per_sm
            return f"warps             {c.num_warps}, each of {rows} query rows; {ctas} CTAs per SM"
        if self.is_ampere:
            return f"warps             {c.num_threads // 32}"
        return f"warpgroups        1 producer, {c.num_mma_warpgroups} consumers"

    def _schedule(self) -> list[str]:
        """Who gets which tile, where there is a choice."""
        if not isinstance(self.config, FwdConfig):
            return []
        is_dynamic = self.config.is_dynamic(self.signature)
        return [
            "schedule          dynamic: longest first, each tile to the CTA that asks first"
            if is_dynamic
            else "schedule          static: tiles are dealt ahead"
        ]

    def _smem_limit(self) -> int:
        if not self.is_ampere:
            return SMEM_LIMIT
        of_sm = SMEM_OF_SM[self.target.capability]
        return of_sm - RESERVED if self.is_backward else self.config.smem_limit(of_sm)


def features(signature: AnySignature) -> list[str]:
    """Words for what few kernels do."""
    found = ["ragged"] * signature.is_ragged
    found += [signature.score] if getattr(signature, "score", None) else []
    found += ["sinks"] * getattr(signature, "sinks", False)
    found += ["split"] * getattr(signature, "is_split", False)
    rows = getattr(signature, "page_rows", 0)
    found += [f"pages of {rows}"] * (rows > 0)
    found += ["packed heads"] * getattr(signature, "packs_heads", False)
    found += [f"cache in {signature.widens}"] if getattr(signature, "widens", None) else []
    found += ["deterministic"] * getattr(signature, "deterministic", False)
    found += ["no dQ"] * (not getattr(signature, "with_dq", True))
    return found + ["no dK, dV"] * (not getattr(signature, "with_dkv", True))


def _beside(report: Report) -> str:
    """A line on a kernel that is launched beside the one with the matrix products."""
    r, local = report.resources, report.local
    spills = f"{local.spill_store_bytes} bytes spilled, {r.frame} of local memory"
    return (
        f"beside            {r.threads} threads, {r.registers} registers, {spills}: {r.name[:60]}"
    )


def call_of(args: argparse.Namespace) -> Call:
    dtype = None if args.cache_dtype is None else DTYPES[args.cache_dtype]
    call = Call.of(args)
    return replace(call, splits=args.splits, page_size=args.page_size, cache_dtype=dtype)


def signature_of(args: argparse.Namespace) -> AnySignature:
    """What the public function would compile for such tensors; its errors are that function's."""
    return call_of(args).signature


def kernel_of(signature: AnySignature, target: dispatch.Target = HOPPER) -> dispatch.Kernel:
    """Raises NotImplementedError if there is none."""
    is_backward = isinstance(signature, BwdSignature)
    return (dispatch.backward if is_backward else dispatch.forward)(signature, target)


def shipped_config(signature: AnySignature, target: dispatch.Target = HOPPER) -> AnyConfig:
    """The tuning table's."""
    if isinstance(signature, BwdSignature):
        return tuning.backward(signature, target.capability)
    return tuning.forward(signature, target.capability)


def config_of(
    signature: AnySignature, changes: list[str], target: dispatch.Target = HOPPER
) -> AnyConfig:
    """The tuning table's, with changes: NAME=NUMBER, or schedule=KIND.

    Raises ValueError for what a config does not have.
    """
    shipped = shipped_config(signature, target)
    known = {name for name, value in asdict(shipped).items() if isinstance(value, int)}
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name == "schedule" and hasattr(shipped, name):
            values[name] = value
            continue
        if name not in known or not value.isdigit():
            raise ValueError(f"--config {change}: expected NAME=NUMBER, NAME of {sorted(known)}")
        values[name] = int(value)
    config = replace(shipped, **values)
    try:
        config.check(signature)
    except ValueError as error:
        raise ValueError(f"--config {' '.join(changes)}: {error}") from None
    return config


def inspect(
    signature: AnySignature,
    config: AnyConfig | None = None,
    target: dispatch.Target = HOPPER,
) -> Inspection:
    """Compile, or take from the cache, and read; the tuning table's config unless told."""
    kernel = kernel_of(signature, target)
    config = config or shipped_config(signature, target)
    artifacts = jit.artifacts(kernel.where, signature, config, target.arch)
    report = analyse(artifacts.cubin)
    return Inspection(signature, config, kernel, artifacts, report, target)


def dump(inspection: Inspection, folder: Path) -> list[Path]:
    """Write the PTX, the cubin and a SASS listing; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        ".ptx": inspection.artifacts.ptx.encode(),
        ".cubin": inspection.artifacts.cubin,
        ".sass": inspection.report.program.text.encode(),
    }
    paths = []
    for suffix, content in contents.items():
        path = folder / f"{inspection.stem}{suffix}"
        path.write_bytes(content)
        paths.append(path)
    return paths


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fa3")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("inspect", help="registers, spills, tiles and instruction mix")
    p.add_argument("--head-dim", type=int, required=True, help="of q and k")
    p.add_argument("--dtype", default="bf16", help=f"{', '.join(DTYPES)} (%(default)s)")
    add_arguments_of_call(p)
    p.add_argument("--splits", type=int, default=1, metavar="N", help="of the keys (%(default)s)")
    p.add_argument("--page-size", type=int, default=0, metavar="TOKENS", help="of a cache's pages")
    p.add_argument("--cache-dtype", choices=["e4m3"], help="of k and v beside 16-bit q")
    p.add_argument("--ragged", action="store_true", help="sequences of different lengths")
    p.add_argument("--arch", choices=TARGETS, default="sm_90a", help="of the GPU (%(default)s)")
    p.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="instead of the table's; also schedule=static or dynamic",
    )
    p.add_argument("--dump", type=Path, metavar="DIR", help="write .ptx, .cubin and .sass there")
    p.add_argument("--json", action="store_true", help="print JSON")
    run.add_arguments(p)
    model_cli.add_arguments(commands.add_parser("predict", help="the speed of kernels in cubins"))
    doctor.add_arguments(commands.add_parser("doctor", help="what would run here, and why not"))
    warm.add_arguments(commands.add_parser("warm", help="fill the cache ahead of the first call"))
    return parser.parse_args(argv)


def _json(inspection: Inspection, launch: LaunchProfile | None) -> str:
    found = inspection.as_dict()
    if launch is not None:
        found["run"] = launch.as_dict()
    return json.dumps(found, indent=1)


def _text(inspection: Inspection, launch: LaunchProfile | None) -> str:
    return str(inspection) if launch is None else f"{inspection}\nrun on the emulator: {launch}"


def _check_cache(args: argparse.Namespace) -> None:
    for name, smallest in (("splits", 1), ("page_size", 0)):
        given = getattr(args, name)
        if given < smallest:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {given}, expected at least {smallest}")
    if call_of(args).is_of_cache and (args.backward or args.run or args.timeline):
        what = "--backward" if args.backward else "--run"
        raise ValueError(f"{what} goes with none of --splits, --page-size and --cache-dtype")


def _check_options(args: argparse.Namespace) -> None:
    if args.ragged and (args.run or args.timeline):
        raise ValueError("--run is of sequences of one length: expected no --ragged")
    if args.deterministic and not args.backward:
        raise ValueError("--deterministic is of a backward pass: expected --backward, too")
    if args.backward and args.config and (args.run or args.timeline):
        raise ValueError("--run of a backward pass is of the tuning table: expected no --config")


def _emulate(arch: str) -> None:
    """Calls on CPU tensors, too: --run of a backward pass makes one."""
    os.environ.update(FA3_CPU="emulate", FA3_ARCH=arch)
    emulator.install(arch)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    commands = {"predict": model_cli, "doctor": doctor, "warm": warm}
    return commands[args.command].run(args) if args.command in commands else _inspect(args)


def _inspect(args: argparse.Namespace) -> int:
    try:
        lengths = run.lengths_of(args)
        _check_options(args)
        _check_cache(args)
        if args.run or args.timeline:
            _emulate(args.arch)  # before anything is compiled
        signature, target = signature_of(args), TARGETS[args.arch]
        kernel_of(signature, target)
        config = config_of(signature, args.config, target)
        runs = args.run or args.timeline
        if runs:
            print("compiling, unless the cache has the kernel", file=sys.stderr, flush=True)
        inspection = inspect(signature, config, target)
        launch = run.run(inspection, call_of(args), lengths) if runs else None
        print(_json(inspection, launch) if args.json else _text(inspection, launch))
        if args.timeline:
            run.write_timeline(inspection, launch, args.timeline)
            print(f"wrote {args.timeline}", file=sys.stderr)
        if args.dump:
            for path in dump(inspection, args.dump):
                print(f"wrote {path}", file=sys.stderr)
    except (TypeError, ValueError, NotImplementedError) as error:
        print(f"fa3 inspect: {error}", file=sys.stderr)
        return 2
    except (DisassemblerMissing, emulator.EmulatorError, OSError) as error:
        print(f"fa3 inspect: {error}", file=sys.stderr)
        return 1
    return 0
