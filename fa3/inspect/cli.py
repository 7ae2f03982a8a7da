"""`python -m fa3 inspect`: the kernel that a call would get, compiled and read; needs no GPU."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import dispatch, jit, tuning
from ..jit import Artifacts
from ..kernels.config import SMEM_LIMIT, FwdConfig
from ..kernels.signature import Signature
from ..problem import Layout, Options, Problem
from .report import Report, analyse
from .sass import DisassemblerMissing

HOPPER = dispatch.Target("gpu", "an sm_90a GPU", (9, 0), 132)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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

    @property
    def stem(self) -> str:
        """File name without a suffix."""
        s = self.signature
        return f"forward_sm90_{s.dtype}_d{s.head_dim}_dv{s.head_dim_v}_{s.mask}"

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "kernel": self.kernel.where,
            "signature": asdict(self.signature),
            "config": asdict(self.config) | {"tile_m": self.config.tile_m},
            "smem_bytes": self.smem_bytes,
            "report": self.report.as_dict(),
        }

    def __str__(self) -> str:
        s, c = self.signature, self.config
        lines = [
            f"call              {s.dtype}, head dim {s.head_dim}, of v {s.head_dim_v} (tiles), "
            f"mask {s.mask}",
            f"served by         {self.kernel.name}, {self.kernel.where}",
            f"config            {c}",
            f"tiles             {c.tile_m} query rows x {c.tile_n} key rows",
            f"stages            {c.num_stages} of K and of V",
            f"warpgroups        1 producer, {c.num_mma_warpgroups} consumers",
            f"shared memory     {self.smem_bytes} bytes per CTA at launch, at most; "
            f"the limit is {SMEM_LIMIT}",
            str(self.report),
        ]
        return "\n".join(lines)


def signature_of(args: argparse.Namespace) -> Signature:
    """What the public function would compile for such tensors; its errors are that function's."""
    head_dim_v = args.head_dim if args.head_dim_v is None else args.head_dim_v
    dtype = DTYPES.get(args.dtype, getattr(torch, args.dtype, None))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"--dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")

    def layout(d: int) -> Layout:
        return Layout((1, 1, 1, d), (d, d, d, 1), dtype, torch.device("meta"))

    q, v = layout(args.head_dim), layout(head_dim_v)
    options = Options(causal=args.causal, window_left=args.window[0], window_right=args.window[1])
    return Problem.of(q, q, v, options).signature


def inspect(signature: Signature) -> Inspection:
    """Compile, or take from the cache, and read."""
    kernel = dispatch.forward(signature, HOPPER)
    config = tuning.forward(signature)
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
    p.add_argument("--dtype", default="bf16", help=f"{' or '.join(DTYPES)} (%(default)s)")
    p.add_argument("--causal", action="store_true")
    p.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(-1, -1),
        metavar=("LEFT", "RIGHT"),
        help="window_size of the call; -1 is no bound",
    )
    p.add_argument("--dump", type=Path, metavar="DIR", help="write .ptx, .cubin and .sass there")
    p.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    try:
        inspection = inspect(signature_of(args))
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
