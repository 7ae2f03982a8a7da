"""python -m fa3.emulator mutants: how many of the project's kernels' bugs the emulator notices.

Each mutant is a kernel without one of its fences, arrivals, waits, commits or barriers.  It runs on
a small case with all checks: eagerly, late, and under a few random schedules.  Ends with the line
"caught N of M"; what was not caught is listed with the reason, where it is known.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Sequence

from . import settings
from .mutation import Judge, Mutant

Run = Callable[[], Sequence]

# case (a pattern), how "kind file.py:function: line" begins, why nobody can notice it is missing
EQUIVALENT = [
    (".*", "barrier barriers.py:wait:", "turns at the tensor cores: order of issue, not of data"),
    (
        "(forward|fp8)-.*",
        "barrier tile_queue.py:write:",
        "only lists of tiles are read by other lanes than the one that writes and arrives",
    ),
    (
        "forward-.*",
        "barrier kernel.py:_wait_for_space_of_o: cute.arch.sync_warp()",
        "of Ampere: ldmatrix, which reads what O then takes the place of, is a warp's instruction",
    ),
    (".*", "barrier tile_queue.py:read:", "lanes meet again before Q is given back"),
    *(
        (case, what, "K's arrival comes ahead of that of the V waited for beside it")
        for case, what in (
            (
                "(gathered|widened)-causal",
                "wait attend.py:attend: key = k.wait_and_advance()",
            ),
            ("gathered-causal", "barrier gather.py:_arrive: cute.arch.sync_warp()"),
        )
    ),
    ("widened-.*", "fence widen.py:_widen:", "K's: the same warps' fence of that V comes later"),
    (
        "backward-.*in-order",
        "fence dq.py:_wait:",
        "PTX asks for it between additions of two CTAs; no check follows it in global memory",
    ),
]


def _forward(*lengths, dtype="bfloat16", d=128, **options) -> Callable[[], Run]:
    """The forward kernel on each of these (s_q, s_k)."""

    def inputs(s_q: int, s_k: int) -> dict:
        import torch

        import fa3

        q, k, v = (torch.randn(1, s, h, d).bfloat16() for s, h in ((s_q, 2), (s_k, 1), (s_k, 1)))
        if dtype != "fp8":
            return {
                name: x.to(getattr(torch, dtype)) for name, x in zip("qkv", (q, k, v), strict=True)
            }
        made = fa3.quantize_fp8(q, k, v)._asdict()
        return {name: made[name] for name in ("q", "k", "v", "q_descale", "k_descale", "v_descale")}

    def case() -> Run:
        import torch

        import fa3

        torch.manual_seed(0)
        given = [inputs(*pair) for pair in lengths]
        # one CTA works off all tiles, so that its rings go round
        settings = {"sm_margin": 131, "return_attn_probs": True, **options}

        def run():
            return [x for tensors in given for x in fa3.flash_attn_func(**tensors, **settings)]

        return run

    return case


def _ragged(lengths_q, lengths_k, dtype="bfloat16", d=128, **options) -> Callable[[], Run]:
    """The forward kernel on packed sequences of these lengths, and the one that lists its tiles."""

    def case() -> Run:
        import torch

        import fa3

        torch.manual_seed(0)
        q, k, v = (
            torch.randn(sum(lengths), h, d).to(getattr(torch, dtype))
            for lengths, h in ((lengths_q, 2), (lengths_k, 1), (lengths_k, 1))
        )
        arguments = {"q": q, "k": k, "v": v, "sm_margin": 130, "return_attn_probs": True, **options}
        for side, lengths in (("q", lengths_q), ("k", lengths_k)):
            arguments[f"cu_seqlens_{side}"] = torch.tensor([0, *lengths]).cumsum(0).int()
            arguments[f"max_seqlen_{side}"] = max(lengths)
        if q.itemsize == 1:
            for name, x in (("q", q), ("k", k), ("v", v)):
                blocks = len(x) // 128 + len(lengths_q)  # scales.packed_blocks
                arguments[f"{name}_descale"] = torch.rand(1, x.shape[1], blocks) + 0.5

        def run():
            return fa3.flash_attn_varlen_func(**arguments)

        return run

    return case


def _cached(  # noqa: PLR0913
    page_size, lengths_q, lengths_k, dtype="bfloat16", cache=None, d=128, **options
):
    """The forward kernel on packed queries and caches in pages; cache: their dtype, if not q's."""

    def case() -> Run:
        import torch

        import fa3

        torch.manual_seed(0)
        counts = [-(-length // page_size) for length in lengths_k]
        pages = iter(torch.randperm(sum(counts)).tolist())
        table = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
        for row, count in zip(table, counts, strict=True):
            row[:count] = torch.tensor([next(pages) for _ in range(count)])
        shape = sum(counts), page_size, 1, d
        kinds = dtype, cache or dtype, cache or dtype
        q, k, v = (
            torch.randn(n).to(getattr(torch, kind))
            for n, kind in zip(((sum(lengths_q), 2, d), shape, shape), kinds, strict=True)
        )
        arguments = {
            "cu_seqlens_q": torch.tensor([0, *lengths_q]).cumsum(0).int(),
            "max_seqlen_q": max(lengths_q),
            "cache_seqlens": torch.tensor(lengths_k).int(),
            "page_table": table,
        }
        settings = {"num_splits": 1, "sm_margin": 130, "return_softmax_lse": True, **options}

        def run():
            return fa3.flash_attn_with_kvcache(q, k, v, **arguments, **settings)

        return run

    return case


def _quantize(**options) -> Callable[[], Run]:
    """The quantisation kernels of q, k and v, of which each has more work than CTAs."""

    def case() -> Run:
        import torch

        import fa3

        torch.manual_seed(0)
        q, k, v = (torch.randn(1, s, h, 128).bfloat16() for s, h in ((300, 2), (260, 1), (260, 1)))

        def run():
            return [x for x in fa3.quantize_fp8(q, k, v, **options) if x is not None]

        return run

    return case


def _backward(*lengths, dtype="bfloat16", d=128, dv=None, deterministic=False, **options):
    """The kernels of a backward pass on each of these (s_q, s_k); options: of the operator."""

    def case() -> Run:
        import torch

        import fa3  # noqa: F401 - for its operators

        torch.manual_seed(0)
        # one CTA works off all tiles, so that its rings go round; in order two, of which one waits
        settings = {"sm_margin": 130 if deterministic else 131, **options}
        given = []
        for s_q, s_k in lengths:
            q, k, v, dout = (
                torch.randn(1, s, h, width).to(getattr(torch, dtype))
                for s, h, width in ((s_q, 2, d), (s_k, 1, d), (s_k, 1, dv or d), (s_q, 2, dv or d))
            )
            given.append((dout, q, k, v, *torch.ops.fa3.forward(q, k, v, **settings)))

        def run():
            backward = torch.ops.fa3.backward
            return [
                x
                for tensors in given
                for x in backward(*tensors, **settings, deterministic=deterministic)
            ]

        return run

    return case


# At these lengths each loop runs, and some tile has as many key blocks as a ring has stages.
CASES: dict[str, Callable[[], Run]] = {
    "forward-full": _forward((200, 512), (200, 700), d=64),
    "forward-causal": _forward((300, 330), (150, 600), causal=True),
    "forward-local": _forward((500, 530), (150, 900), window_size=(330, 50)),
    "forward-256": _forward((150, 160), (150, 400), dtype="float16", d=256),
    "fp8-full": _forward((200, 256), (200, 500), dtype="fp8"),
    "fp8-causal": _forward((300, 330), (150, 600), dtype="fp8", d=64, causal=True),
    "ragged-causal": _ragged((200, 0, 70, 300), (250, 40, 0, 600), causal=True),
    "ragged-fp8": _ragged((200, 0, 70, 150), (256, 40, 0, 500), dtype="float8_e4m3fn"),
    "split-full": _forward((200, 1300), num_splits=2),
    "paged-causal": _cached(16, (200, 0, 3, 70), (600, 40, 250, 0), causal=True),
    "gathered-causal": _cached(5, (200, 0, 3, 70), (600, 40, 250, 0), causal=True),
    "gathered-fp8": _cached(1, (200, 0, 70), (600, 40, 250), dtype="float8_e4m3fn"),
    "widened-causal": _cached(
        *(16, (200, 0, 3, 70), (600, 40, 250, 0)),
        cache="float8_e4m3fn",
        causal=True,
        sm_margin=131,  # one CTA, so that slots of the board are used again
    ),
    "backward-full": _backward((200, 256), (300, 150), d=64),
    "backward-causal": _backward((330, 300), (70, 200), causal=True),
    # its first tile has two blocks masked on one side, one unmasked, one masked on the other side
    "backward-local": _backward((400, 150), d=64, window_left=50, window_right=270),
    "backward-192": _backward((200, 150), d=192, dv=128),
    "backward-256": _backward((200, 150), dtype="float16", d=256),
    # on three CTAs, each of which waits for those before it: the emulator runs one after another
    "backward-in-order": _backward((300, 450), d=64, deterministic=True, sm_margin=129),
    # the first two tiles end with the same block: the second one waits for the first one's end
    "backward-causal-in-order": _backward(
        (400, 450), d=64, deterministic=True, causal=True, sm_margin=129
    ),
    "quantize-block": _quantize(hadamard=True),
    "quantize-channel": _quantize(v_per_channel=True, smooth_k=True),
}


def checks_of(case: str) -> tuple[str, ...]:
    return (*settings.ALL_CHECKS, "sums") if case.endswith("in-order") else settings.ALL_CHECKS


def reason(case: str, judge: Judge, mutant: Mutant) -> str:
    """Why a survivor was not caught; "" if that is not known."""
    if not judge.reaches(mutant):
        return "never run in this case"
    what = f"{mutant.kind} {mutant.source}"
    return next(
        (why for cases, w, why in EQUIVALENT if what.startswith(w) and re.match(cases, case)), ""
    )


def run_mutants(names: Sequence[str], sample: int | None, seed: int, report=print) -> int:
    """Judge mutants of these cases; returns the number of survivors without a known reason."""
    from . import install

    install(os.environ.get("FA3_ARCH", "sm_90a"))
    judges = {name: Judge(CASES[name](), checks=checks_of(name)) for name in names}
    todo = [(name, mutant) for name, judge in judges.items() for mutant in judge.mutants]
    if sample is not None and sample < len(todo):
        todo = sorted(random.Random(seed).sample(todo, sample), key=todo.index)
    caught, unexplained, current = 0, 0, None
    for name, mutant in todo:
        if name != current:
            report(f"{name}: {sum(n == name for n, _ in todo)} mutants")
            current = name
        verdict = judges[name].verdict(mutant)
        caught += verdict is not None
        if verdict is None:
            why = reason(name, judges[name], mutant)
            unexplained += not why
            verdict = f"SURVIVES ({why or 'no reason known'})"
        report(f"  {mutant!s:80}  {verdict}")
    report(f"caught {caught} of {len(todo)}")
    return unexplained


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a mutant survives without a known reason."""
    parser = argparse.ArgumentParser(prog="python -m fa3.emulator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    mutants = commands.add_parser("mutants", help="break the kernels and count who notices")
    mutants.add_argument("--kernel", choices=CASES, action="append", help="default: all")
    mutants.add_argument("--sample", type=int, metavar="N", help="only N mutants, drawn at random")
    mutants.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw")
    given = parser.parse_args(arguments)
    if given.sample is not None and given.sample < 1:
        mutants.error(f"--sample is {given.sample}, expected at least 1")
    os.environ["FA3_CPU"] = "emulate"
    return int(run_mutants(given.kernel or list(CASES), given.sample, given.seed) > 0)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # end as other tools do when nobody reads on: ... | head
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
