"""The call that the command line describes: its tensors, as shapes or with numbers in them."""

import argparse
from dataclasses import dataclass, replace

import torch

from .. import autograd
from ..call import lengths as lengths_
from ..call.layout import Layout
from ..call.lengths import EQUAL
from ..call.problem import Options, Problem
from ..call.scales import Descales, num_blocks
from ..kernels.bwd_signature import BwdSignature
from ..kernels.signature import Signature

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# --scales: queries or keys per scale of q, k and v; 0: one per head
SCALES = {"block": (128, 128, 128), "block64": (128, 64, 64), "head": (0, 0, 0)}


def add_arguments_of_call(parser: argparse.ArgumentParser) -> None:
    """All that `Call.of` reads but --head-dim and --dtype."""
    parser.add_argument("--head-dim-v", type=int, help="of v and out (that of q)")
    parser.add_argument(
        "--scales",
        choices=SCALES,
        default="block",
        help="of one-byte inputs: per 128 or 64 keys, or per head (%(default)s)",
    )
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(-1, -1),
        metavar=("LEFT", "RIGHT"),
        help="window_size of the call; -1 is no bound",
    )
    parser.add_argument("--softcap", type=float, default=0.0, help="of the call; 0 is none")
    parser.add_argument("--sinks", action="store_true", help="a call with a learnable_sink")
    parser.add_argument("--backward", action="store_true", help="the kernels of gradients")
    parser.add_argument("--deterministic", action="store_true", help="gradients in one order")


@dataclass(frozen=True)
class Lengths:
    """What the kernel does not depend on."""

    s_q: int = 256
    s_k: int = 256
    heads: int = 1


@dataclass(frozen=True)
class Call:
    """All of a call but its lengths."""

    dtype: torch.dtype  # of q and k
    head_dim: int
    head_dim_v: int
    options: Options
    scales: str  # of one-byte inputs, a key of SCALES
    has_sink: bool
    is_backward: bool = False  # the kernels of its gradients
    is_deterministic: bool = False
    splits: int = 1  # of the keys
    page_size: int = 0  # keys per page of a cache; 0: there are no pages
    cache_dtype: torch.dtype | None = None  # of k and v; None: that of q
    is_ragged: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Call":
        dtype = DTYPES.get(args.dtype, getattr(torch, args.dtype, None))
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"--dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
        left, right = args.window
        return cls(
            dtype,
            args.head_dim,
            args.head_dim if args.head_dim_v is None else args.head_dim_v,
            Options(causal=args.causal, window_left=left, window_right=right, softcap=args.softcap),
            args.scales,
            args.sinks,
            args.backward,
            args.deterministic,
            is_ragged=getattr(args, "ragged", False),
        )

    @property
    def is_of_cache(self) -> bool:
        return self.splits > 1 or self.page_size > 0 or self.cache_dtype is not None

    @property
    def signature(self) -> Signature | BwdSignature:
        """What the public function would compile for; its errors are that function's."""
        problem = self.problem(Lengths())
        if self.is_backward:
            found = autograd.signature_of(problem, self.is_deterministic)
        else:
            found = problem.signature.split() if self.splits > 1 else problem.signature
        return replace(found, is_ragged=found.is_ragged or self.is_ragged)

    @property
    def v_dtype(self) -> torch.dtype:
        if self.cache_dtype is not None:
            return self.cache_dtype
        return torch.float8_e4m3fn if self.dtype == torch.int8 else self.dtype

    def shapes(self, lengths: Lengths) -> dict[str, tuple[int, ...]]:
        """Of q, k and v."""
        s_q, s_k, heads = lengths.s_q, lengths.s_k, lengths.heads
        return {
            "q": (1, s_q, heads, self.head_dim),
            "k": (1, s_k, heads, self.head_dim),
            "v": (1, s_k, heads, self.head_dim_v),
        }

    def descale_shapes(self, lengths: Lengths) -> list[tuple[int, ...]]:
        """Of those of q, k and v; none for 16-bit inputs."""
        if self.dtype.itemsize > 1:
            return []
        rows = lengths.s_q, lengths.s_k, lengths.s_k
        return [
            (1, lengths.heads, num_blocks(n, block)) if block else (1, lengths.heads)
            for n, block in zip(rows, SCALES[self.scales], strict=True)
        ]

    def problem(self, lengths: Lengths) -> Problem:
        """Its errors are those of the public function."""
        shapes = self.shapes(lengths)
        of_lengths = EQUAL
        if self.page_size:
            pages = num_blocks(lengths.s_k, self.page_size)
            numbers = (_layout(shape, torch.int32) for shape in ((1,), (1, pages)))
            of_lengths = lengths_.Lengths(None, None, None, *numbers)
            for name in "kv":
                shapes[name] = pages, self.page_size, *shapes[name][2:]
        q = _layout(shapes["q"], self.dtype)
        k = _layout(shapes["k"], self.cache_dtype or self.dtype)
        v = _layout(shapes["v"], self.v_dtype)
        scales = (_layout(shape, torch.float32) for shape in self.descale_shapes(lengths))
        sink = _layout((lengths.heads,), torch.float32) if self.has_sink else None
        more = {"lengths": of_lengths, "learnable_sink": sink}
        return Problem.of(q, k, v, self.options, Descales(*scales), **more)

    def tensors(self, lengths: Lengths) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """q, k and v, about normal, and the descales: ones."""
        generator = torch.Generator("cpu").manual_seed(0)
        found = []
        for name, shape in self.shapes(lengths).items():
            values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            dtype = self.v_dtype if name == "v" else self.dtype
            found.append(
                (32 * values).clamp(-127, 127).to(dtype)
                if dtype == torch.int8
                else values.to(dtype)
            )
        shapes = self.descale_shapes(lengths)
        return found, [torch.ones(x, dtype=torch.float32, device="cpu") for x in shapes]


def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    return Layout(shape, strides, dtype, torch.device("meta"))
