"""Rewrite the table of docs/evidence.md from what this machine does now: compile, run, compare.

    python -m perf.evidence            every kernel variant, some minutes on two cores
    python -m perf.evidence --check    compile and run, but leave the document alone

A variant is a row of the tuning tables, a dtype and a mask. Each is compiled for sm_90a, its SASS
is read, and it runs on the CPU emulator with all checks on, against fp32. The GPU columns come from
perf/results/*.csv, which perf.sweep wrote on a GPU; a variant without a line there is not measured.
"""

import argparse
import datetime
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from fa3.kernels.signature import Q_BLOCK, Signature
from fa3.launch import tuning

from .backends import OURS
from .cases import DTYPES
from .check import attention, visible_keys
from .document import insert, table
from .progress import track
from .results import RESULTS, ROOT, Row, read_all
from .sweep import commit
from .variants import QUANTISED, name_of, shipped

DOCUMENT = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- begin: python -m perf.evidence -->", "<!-- end -->"
WINDOW = (100, 30)  # of the variants with a local mask
S_Q, S_K = 250, 333
NOT_MEASURED = "not measured"
COLUMNS = (
    "variant",
    "tile",
    "stages",
    "local memory",
    "slots per exp",
    "emulator, max error",
    "torch's max error",
    "Hopper GPU",
    "TFLOPs/s",
)


def compiled(signature: Signature) -> tuple[str, str, str, str]:
    """Compile for sm_90a and read the SASS: tile, stages, local memory in bytes, slots per exp.

    The slots are those of the steady main loop, per exponential of one thread.
    """
    from fa3.inspect.cli import inspect

    found = inspect(signature)
    config, report = found.config, found.report
    if report.serialised:
        raise RuntimeError(f"{name_of(signature)}: ptxas runs its warpgroup MMAs one by one")
    slots = f"{report.steady.straight.per_exponential:.2f}" if report.steady else "-"
    tile = f"{config.tile_m} x {config.tile_n}"
    return tile, str(config.num_stages), str(report.resources.frame), slots


def emulated(signature: Signature) -> tuple[float, float]:
    """Run on the emulator with all checks: the largest errors against fp32, ours and torch's own.

    torch's is that of the same formula with every step in the variant's dtype.
    """
    import fa3

    torch.manual_seed(0)
    heads, widths = 2, (signature.head_dim, signature.head_dim, signature.head_dim_v)
    shapes = zip((S_Q, S_K, S_K), widths, strict=True)
    q, k, v = (torch.randn(1, length, heads, width) for length, width in shapes)
    attend = _attend_16_bit if signature.quantised is None else _attend_one_byte
    with fa3.emulator.options(checks=fa3.emulator.ALL_CHECKS):
        out, exact, plain = attend(signature, q, k, v)
    ours, torchs = ((x.float() - exact).abs().max().item() for x in (out, plain))
    if not ours <= 2 * torchs:
        name = name_of(signature)
        raise RuntimeError(f"{name}: largest error {ours:.2g}, torch's own is {torchs:.2g}")
    return ours, torchs


def _attend_16_bit(signature: Signature, *inputs) -> tuple:
    """(b, s_q, h, dv): the kernel's output, that of fp32, that of torch."""
    import fa3

    causal, window = _mask(signature)
    inputs = [x.to(DTYPES[signature.dtype]) for x in inputs]
    out = fa3.flash_attn_func(*inputs, causal=causal, window_size=window)
    seen = visible_keys(S_Q, S_K, window[0], 0 if causal else window[1])
    heads_first = [x[0].transpose(0, 1) for x in inputs]
    exact = attention(*(x.float() for x in heads_first), seen)
    return out[0].transpose(0, 1), exact, attention(*heads_first, seen)


def _attend_one_byte(signature: Signature, *inputs) -> tuple:
    """The same, of the bytes times their scales; torch rounds only P, to e4m3, and the output."""
    import fa3
    from tests.fp8_reference import Attention

    causal, window = _mask(signature)
    made = fa3.quantize_fp8(
        *(x.bfloat16() for x in inputs),
        smooth_v=False,
        block_scales=signature.quantised.k_block > 0,
        qk_dtype=torch.int8 if signature.dtype == "int8" else DTYPES[signature.dtype],
    )
    descales = made.q_descale, made.k_descale, made.v_descale
    names = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    out = fa3.flash_attn_func(*made[:3], **names, causal=causal, window_size=window)
    values = [x.double() * _per_element(d, x) for x, d in zip(made[:3], descales, strict=True)]
    attended = Attention.of(*values, signature.head_dim**-0.5, causal, window)
    config = tuning.forward(signature)
    plain = attended.baseline(out.dtype, config.tile_n, sums_rounded=not config.o_slice)
    return out, attended.exact(torch.float32), plain


def _mask(signature: Signature) -> tuple[bool, tuple[int, int]]:
    return signature.mask == "causal", WINDOW if signature.mask == "local" else (-1, -1)


def _per_element(descale, x):
    """(b, h) or (b, h, blocks) -> (b, s, h, 1)"""
    if descale.dim() == 2:
        return descale[:, None, :, None]
    block = Q_BLOCK  # of q; that of k and v is the same here
    return descale.repeat_interleave(block, 2)[:, :, : x.shape[1]].transpose(1, 2)[..., None]


def measured(signature: Signature, folder: Path = RESULTS) -> tuple[str, str]:
    """(device and date, TFLOPs/s and length) of the newest sweep at the longest length."""
    found = [(row, machine) for row, machine in read_all(folder) if _is_of(row, signature)]
    if not found:
        return NOT_MEASURED, NOT_MEASURED
    row, machine = max(found, key=lambda pair: (pair[0].length, pair[1].date))
    return f"{machine.device}, {machine.date[:10]}", f"{row.tflops:.0f} at {row.length}"


def _is_of(row: Row, signature: Signature) -> bool:
    mask = "causal" if row.causal else "full"
    wanted = signature.dtype, signature.head_dim, signature.head_dim_v, signature.mask
    is_timed = row.backend == OURS and row.tflops is not None
    if signature.quantised not in (None, QUANTISED["block scales"]):
        return False  # the sweep times what calls get by default
    return is_timed and (row.dtype, row.head_dim, row.head_dim, mask) == wanted


def rows():
    """A table row per variant; whatever fails ends the run."""
    for signature in track(shipped(), "variant"):
        ours, torchs = emulated(signature)
        read = compiled(signature)
        errors = f"{ours:.1e}", f"{torchs:.1e}"
        yield (name_of(signature), *read, *errors, *measured(signature))


def markdown(table_rows, made: str) -> str:
    return "\n".join([BEGIN, "", made, "", table(COLUMNS, table_rows), "", END])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    os.environ["FA3_CPU"] = "emulate"
    table_rows = list(rows())
    made = (
        f"{datetime.date.today()}, commit {commit()}: nvidia-cutlass-dsl "
        f"{version('nvidia-cutlass-dsl-libs-base')}, torch {torch.__version__}."
    )
    text = markdown(table_rows, made)
    if options.check:
        print(text)
    else:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), text))
        print(f"{len(table_rows)} variants, written: {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
