"""`python -m fa3 warm`: compile ahead of serving what calls of some kinds would compile.

Which kernels those are is not worked out here: the calls are made, on small tensors, with a
stand-in for the compiler that notes what it is asked for. That is then compiled by several
processes, into the cache on disk (launch/cache.py).
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch

from . import append, autograd, combine, interface, interface_cache, interface_fp8, metadata, ops
from . import quantize_plan as quantise
from .inspect.call import DTYPES, Call, Lengths, add_arguments_of_call
from .launch import cache, dispatch, jit

GPU_SMS = 132  # of which no compiled code depends
CAPACITY = 256  # rows of a cache
CHUNK = 128  # of a prompt: more than fit a tile for few queries
COUNTS = 1, 4, CHUNK  # of the queries of a step


class Wanted(NamedTuple):
    """A kernel that a call asked for: the arguments of `jit.compile`."""

    kernel: str
    signature: Any
    config: Any
    kind: str
    arch: str

    @property
    def name(self) -> str:
        """For a person."""
        where = self.kernel.removeprefix("fa3.kernels.").partition(":")[0]
        return " ".join([where, *_words(self.signature)])

    @property
    def entry(self) -> str:
        return jit.entry_name(*self)


def _words(signature: Any) -> Iterator[str]:
    """The fields that say something."""
    for field in fields(signature):
        value = getattr(signature, field.name)
        if value is True:
            yield field.name
        elif is_dataclass(value):
            yield from _words(value)
        elif isinstance(value, str) or (isinstance(value, int) and value):
            yield str(value)


def target_of(arch: str | None) -> dispatch.Target:
    """What the kernels are for: the emulator with FA3_CPU=emulate, else a GPU.

    arch: None for the GPU of this machine, or sm_90a where there is none.

    Raises ValueError for an arch that there are no kernels for.
    """
    if os.environ.get("FA3_CPU") == "emulate":
        arch = arch or os.environ.get("FA3_ARCH") or jit.ARCH
        kind, name = "emulator", f"emulated {arch}"
    elif arch is None and torch.cuda.is_available():
        return dispatch.target_of(torch.device("cuda", torch.cuda.current_device()))
    else:
        arch = arch or jit.ARCH
        kind, name = "gpu", f"an {arch} GPU"
    if arch not in dispatch.ARCHITECTURES:
        raise ValueError(f"arch is {arch!r}, expected one of {', '.join(dispatch.ARCHITECTURES)}")
    return dispatch.Target(kind, name, dispatch.ARCHITECTURES[arch], GPU_SMS, arch)


def wanted(calls: Sequence[Callable[[], Any]], target: dispatch.Target) -> list[Wanted]:
    """What these calls on CPU tensors would compile if they ran on the target; nothing is computed.

    Raises what a call raises.
    """
    found: dict[Wanted, None] = {}

    def note(kernel, signature, config, kind, arch=jit.ARCH):
        found[Wanted(kernel, signature, config, kind, arch)] = None
        return _do_nothing

    with _instead(dispatch, "target_of", lambda device: target), _instead(jit, "compile", note):
        _forget_plans()
        try:
            for call in calls:
                call()
        finally:
            _forget_plans()
    return list(found)


def _do_nothing(*arguments) -> None:
    pass


@contextlib.contextmanager
def _instead(module, name: str, value) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _forget_plans() -> None:
    """They hold the functions that `jit.compile` returned."""
    for plans in (
        ops.plan_of,
        ops._check_layouts,
        autograd.plan_of,
        autograd._check_layouts,
        append._run_of,
        metadata._plan_of,
        combine._plan_of,
        quantise.plans_of,
    ):
        plans.cache_clear()


def calls_of(args: argparse.Namespace) -> list[Callable[[], Any]]:
    """The calls that the command line describes.

    Raises ValueError or TypeError for what no call can be.
    """
    if args.cache_dtype and not args.cache:
        raise ValueError("--cache-dtype goes with --cache")
    found = []
    for head_dim, dtype in itertools.product(args.head_dim, args.dtype):
        named = vars(args) | {"head_dim": head_dim, "dtype": dtype}
        call = Call.of(argparse.Namespace(**named))
        found += _cached(call, args) if args.cache else _direct(call, args)
    return found


def _options(call: Call) -> dict:
    given = call.options
    return {
        "causal": given.causal,
        "window_size": (given.window_left, given.window_right),
        "softcap": given.softcap,
    }


def _direct(call: Call, args: argparse.Namespace) -> list[Callable[[], Any]]:
    """Calls of flash_attn_func, or with --varlen of flash_attn_varlen_func."""
    lengths = Lengths()
    tensors, descales = call.tensors(lengths)
    options = _options(call)
    if call.has_sink:
        options["learnable_sink"] = torch.zeros(lengths.heads)
    function = interface.flash_attn_func
    if args.quantize:
        if call.dtype.itemsize == 1:
            raise ValueError("--quantize takes 16-bit tensors: expected --dtype bf16 or fp16")
        function = interface_fp8.flash_attn_fp8_func
    elif call.is_backward:
        options["deterministic"] = call.is_deterministic
    if args.varlen:
        function = interface.flash_attn_varlen_func
        if args.quantize:
            function = interface_fp8.flash_attn_varlen_fp8_func
        tensors = [x[0] for x in tensors]
        ends = [torch.tensor([0, n], dtype=torch.int32) for n in (lengths.s_q, lengths.s_k)]
        names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
        options |= zip(names, (*ends, lengths.s_q, lengths.s_k), strict=True)
        descales = [_packed_scales(x, args.scales) for x in descales]
    options |= zip(("q_descale", "k_descale", "v_descale"), descales, strict=False)

    def run(num_splits: int) -> None:
        q, k, v = (x.detach().requires_grad_(call.is_backward) for x in tensors)
        out = function(q, k, v, **options, **({"num_splits": 2} if num_splits > 1 else {}))
        if call.is_backward:
            out.backward(torch.zeros_like(out))

    if args.splits and (args.quantize or call.is_backward):
        raise ValueError("--splits does not go with --quantize or --backward")
    numbers = (1, 2) if args.splits else (1,)
    return [lambda n=n: run(n) for n in numbers]


def _packed_scales(descale: torch.Tensor, scales: str) -> torch.Tensor:
    """Of one packed sequence: a block more than it has rows for."""
    if scales == "head":
        return descale
    return torch.nn.functional.pad(descale, (0, 1), value=1.0)


def _cached(call: Call, args: argparse.Namespace) -> list[Callable[[], Any]]:
    """Calls of flash_attn_with_kvcache: of one query, of a few and of many, with new keys and
    without; and the lists of tiles that may be made ahead of them."""
    if call.is_backward or args.quantize or args.varlen:
        raise ValueError("--cache does not go with --backward, --quantize or --varlen")
    (q, k, v), descales = call.tensors(Lengths(CHUNK, CAPACITY, 2))
    new_k, new_v = k[:, :, :1], v[:, :, :1]
    k, v = (_cache_of(x, args) for x in (new_k, new_v))
    cached = {"cache_seqlens": torch.full((1,), CAPACITY - CHUNK, dtype=torch.int32)}
    if args.page_size:
        cached["page_table"] = torch.arange(len(k), dtype=torch.int32)[None]
    options = _options(call) | cached
    if call.has_sink:
        options["learnable_sink"] = torch.zeros(2)
    descales = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=False))
    for name, x in descales.items():
        if name != "q_descale" or x.dim() == 2:  # only blocks of queries have a scale per head of q
            descales[name] = x[:, :1]

    def run(s_q: int, appends: bool, num_splits: int) -> None:
        new = {}
        if appends:
            new = {name: x[:1, :s_q] for name, x in (("k", new_k), ("v", new_v))}
        interface_cache.flash_attn_with_kvcache(
            q[:, :s_q], k, v, **new, **options, **descales, num_splits=num_splits
        )

    kinds = itertools.product(COUNTS, (False, True), (1, 2))
    calls = [lambda kind=kind: run(*kind) for kind in kinds]
    return calls + _lists(call, args, k.dtype, cached["cache_seqlens"])


def _cache_of(rows: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """For k or v (1, CAPACITY, 1, d)."""
    if args.cache_dtype:
        if rows.itemsize == 1:
            raise ValueError(
                "--cache-dtype goes with 16-bit tensors: expected --dtype bf16 or fp16"
            )
        rows = rows.to(DTYPES[args.cache_dtype])
    if not args.page_size:
        return rows
    return rows.new_zeros(CAPACITY // args.page_size or 1, args.page_size, 1, rows.shape[-1])


def _lists(call: Call, args: argparse.Namespace, kv_dtype, seqlens) -> list[Callable[[], Any]]:
    """Calls of get_scheduler_metadata, which knows one dtype of k and v, and scales per head."""
    if call.dtype == torch.int8 or (call.dtype.itemsize == 1 and args.scales != "head"):
        return []
    sizes = CAPACITY, 2, 1, call.head_dim, seqlens, call.dtype, call.head_dim_v
    given = call.options

    def run(s_q: int, num_splits: int) -> None:
        metadata.get_scheduler_metadata(
            *(1, s_q, *sizes),
            page_size=args.page_size or None,
            causal=given.causal,
            window_size=(given.window_left, given.window_right),
            has_softcap=given.softcap > 0,
            num_splits=num_splits,
            pack_gqa=False if call.has_sink else None,
            kv_dtype=kv_dtype,
        )

    return [lambda kind=kind: run(*kind) for kind in itertools.product(COUNTS, (1, 2))]


def build(kernel: Wanted) -> float:
    """Compile it into the cache, in a process of the pool; returns seconds."""
    start = time.monotonic()
    if kernel.kind == "emulator":
        from . import emulator

        emulator.install(kernel.arch)
    jit.artifacts(*kernel[:3], kernel.arch)
    return time.monotonic() - start


def fill(kernels: Sequence[Wanted], processes: int) -> int:
    """Compile them, a line for each as it is ready; returns how many failed."""
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(kernels)), context) as pool:
        jobs = {pool.submit(build, kernel): kernel for kernel in kernels}
        for number, job in enumerate(as_completed(jobs), 1):
            place, name = f"[{number}/{len(kernels)}]", jobs[job].name
            if error := job.exception():
                failed += 1
                print(f"{place} FAILED  {name}: {error}", file=sys.stderr, flush=True)
            else:
                print(f"{place} {job.result():5.1f} s  {name}", flush=True)
    return failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compile what such calls would compile, into the cache on disk. With FA3_CPU=emulate in "
        "the environment it compiles for the emulator."
    )
    parser.add_argument("--head-dim", type=int, nargs="+", required=True, help="of q and k")
    parser.add_argument(
        "--dtype", nargs="+", default=["bf16"], help=f"one or more of {', '.join(DTYPES)} (bf16)"
    )
    add_arguments_of_call(parser)
    parser.add_argument("--varlen", action="store_true", help="packed sequences")
    parser.add_argument("--splits", action="store_true", help="also with num_splits above 1")
    parser.add_argument("--quantize", action="store_true", help="flash_attn_fp8_func of the dtype")
    parser.add_argument(
        "--cache", action="store_true", help="flash_attn_with_kvcache, with and without new keys"
    )
    parser.add_argument("--page-size", type=int, default=0, help="of --cache; 0: not in pages")
    parser.add_argument(
        "--cache-dtype", choices=["e4m3"], help="of --cache, with 16-bit tensors (the same dtype)"
    )
    parser.add_argument(
        "--arch",
        choices=dispatch.ARCHITECTURES,
        help="of the GPU (that of this machine, else sm_90a)",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at once (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """0: all are in the cache; 1: some failed, or nothing can be kept; 2: there is no such call."""
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}, expected at least 1")
        if args.deterministic and not args.backward:
            raise ValueError("--deterministic is of a backward pass: expected --backward, too")
        target = target_of(args.arch)
        kernels = wanted(calls_of(args), target)
    except (TypeError, ValueError, NotImplementedError) as error:
        print(f"fa3 warm: {error}", file=sys.stderr)
        return 2
    if why := cache.why_not():
        print(f"fa3 warm: nothing can be kept: {why}", file=sys.stderr)
        return 1
    missing = [kernel for kernel in kernels if not cache.holds(kernel.entry)]
    there = len(kernels) - len(missing)
    number = f"{len(kernels)} kernel{'s' * (len(kernels) > 1)}"
    kept = f"{there} in {cache.folder()} already, {len(missing)} to compile"
    print(f"{number} for {target.name}: {kept}", flush=True)
    return int(bool(missing) and fill(missing, args.jobs) > 0)
