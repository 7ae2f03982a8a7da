"""`python -m fa3 inspect`: the kernel that a call would get, compiled, read and predicted.

`python -m fa3 predict`, for any cubin, is in `model.cli`. Neither needs a GPU.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch

from .. import dispatch, jit, tuning
from ..jit import Artifacts
from ..kernels.config import SMEM_LIMIT, FwdConfig
from ..kernels.signature import Signature
from ..layout import Layout
from ..problem import Options, Problem
from ..scales import Descales
from .model import cli as model_cli
from .model.predict import Prediction, Settings, predict_report
from .model.report import as_dict, summary
from .report import Report, analyse
from .sass import DisassemblerMissing

HOPPER = dispatch.Target("gpu", "an sm_90a GPU", (9, 0), 132)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# --scales: shapes of q_descale, k_descale and v_descale for one head and 256 rows of each
SCALES = {
    "block": ((1, 1, 2), (1, 1, 2), (1, 1, 2)),
    "block64": ((1, 1, 2), (1, 1, 4), (1, 1, 4)),
    "head": ((1, 1),) * 3,
}
ROWS = 256


@dataclass(frozen=True)
class Inspection:
    """A kernel with all that led to it."""

    signature: Signature
    config: FwdConfig
    kernel: dispatch.Kernel
    artifacts: Artifacts
    report: Report

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA: what a launch asks for, or up to 1024 bytes more."""
        return self.config.smem_bytes(self.signature)

    @cached_property
    def prediction(self) -> Prediction:
        """Of the timing model, for a long sequence on an H100."""
        settings = Settings(consumers=self.config.num_mma_warpgroups)
        return predict_report(self.report, settings)

    @property
    def stem(self) -> str:
        """File name without a suffix."""
        s = self.signature
        scales = "" if s.quantised is None else f"_{s.quantised.out}_v{s.quantised.v_block}"
        return f"forward_sm90_{s.dtype}_d{s.head_dim}_dv{s.head_dim_v}_{s.mask}{scales}"

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "kernel": self.kernel.where,
            "signature": asdict(self.signature),
            "config": asdict(self.config) | {"tile_m": self.config.tile_m},
            "smem_bytes": self.smem_bytes,
            "report": self.report.as_dict(),
            "prediction": as_dict(self.prediction),
        }

    def __str__(self) -> str:
        s, c = self.signature, self.config
        lines = [
            f"call              {s.dtype}, head dim {s.head_dim}, of v {s.head_dim_v} (tiles), "
            f"mask {s.mask}",
            *([f"one-byte inputs   {s.quantised}"] if s.quantised else []),
            f"served by         {self.kernel.name}, {self.kernel.where}",
            f"config            {c}",
            f"tiles             {c.tile_m} query rows x {c.tile_n} key rows",
            f"stages            {c.num_stages} of K and of V",
            f"warpgroups        1 producer, {c.num_mma_warpgroups} consumers",
            f"shared memory     {self.smem_bytes} bytes per CTA at launch, at most; "
            f"the limit is {SMEM_LIMIT}",
            str(self.report),
            *summary(self.prediction),
        ]
        return "\n".join(lines)


def signature_of(args: argparse.Namespace) -> Signature:
    """What the public function would compile for such tensors; its errors are that function's."""
    head_dim_v = args.head_dim if args.head_dim_v is None else args.head_dim_v
    dtype = DTYPES.get(args.dtype, getattr(torch, args.dtype, None))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"--dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")

    def layout(*shape: int, dtype: torch.dtype) -> Layout:
        strides = torch.empty(shape, device="meta").stride()
        return Layout(shape, strides, dtype, torch.device("meta"))

    q = layout(1, ROWS, 1, args.head_dim, dtype=dtype)
    v_dtype = torch.float8_e4m3fn if dtype == torch.int8 else dtype
    v = layout(1, ROWS, 1, head_dim_v, dtype=v_dtype)
    options = Options(causal=args.causal, window_left=args.window[0], window_right=args.window[1])
    if dtype.itemsize > 1:
        return Problem.of(q, q, v, options).signature
    descales = Descales(*(layout(*shape, dtype=torch.float32) for shape in SCALES[args.scales]))
    return Problem.of(q, q, v, options, descales).signature


def config_of(signature: Signature, changes: list[str]) -> FwdConfig:
    """The tuning table's, with NAME=VALUE changes; ValueError for what a config does not have."""
    shipped = tuning.forward(signature)
    known = {field.name for field in fields(shipped)}
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in known or not value.isdigit():
            raise ValueError(f"--config {change}: expected NAME=NUMBER, NAME of {sorted(known)}")
        values[name] = type(getattr(shipped, name))(int(value))
    return replace(shipped, **values)


def inspect(signature: Signature, config: FwdConfig | None = None) -> Inspection:
    """Compile, or take from the cache, and read; the tuning table's config unless told."""
    kernel = dispatch.forward(signature, HOPPER)
    config = config or tuning.forward(signature)
    artifacts = jit.artifacts(kernel.where, signature, config)
    return Inspection(signature, config, kernel, artifacts, analyse(artifacts.cubin))


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
    p.add_argument("--head-dim-v", type=int, help="of v and out (that of q)")
    p.add_argument("--dtype", default="bf16", help=f"{', '.join(DTYPES)} (%(default)s)")
    p.add_argument(
        "--scales",
        choices=SCALES,
        default="block",
        help="of one-byte inputs: per 128 or 64 keys, or per head (%(default)s)",
    )
    p.add_argument("--causal", action="store_true")
    p.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(-1, -1),
        metavar=("LEFT", "RIGHT"),
        help="window_size of the call; -1 is no bound",
    )
    p.add_argument(
        "--config", nargs="+", default=[], metavar="NAME=NUMBER", help="instead of the table's"
    )
    p.add_argument("--dump", type=Path, metavar="DIR", help="write .ptx, .cubin and .sass there")
    p.add_argument("--json", action="store_true", help="print JSON")
    model_cli.add_arguments(commands.add_parser("predict", help="the speed of kernels in cubins"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    if args.command == "predict":
        return model_cli.run(args)
    try:
        signature = signature_of(args)
        inspection = inspect(signature, config_of(signature, args.config))
        print(json.dumps(inspection.as_dict(), indent=1) if args.json else inspection)
        if args.dump:
            for path in dump(inspection, args.dump):
                print(f"wrote {path}", file=sys.stderr)
    except (TypeError, ValueError, NotImplementedError) as error:
        print(f"fa3 inspect: {error}", file=sys.stderr)
        return 2
    except (DisassemblerMissing, OSError) as error:
        print(f"fa3 inspect: {error}", file=sys.stderr)
        return 1
    return 0
