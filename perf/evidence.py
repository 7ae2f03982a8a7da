"""Rewrite the table of docs/evidence.md from what this machine does now: compile, run, compare.

    python -m perf.evidence             every kernel variant for Hopper, some minutes on two cores
    python -m perf.evidence backward    only those with this word in their names, others stay
    FA3_ARCH=sm_80 python -m perf.evidence    those for such a GPU, which the emulator is then
    python -m perf.evidence --check     compile and run, but leave the document alone

A variant is a row of the tuning tables, a dtype and a mask. Each is compiled, its SASS is read, and
it runs on the CPU emulator with all checks on, against fp32. The GPU columns come from
perf/results/*.csv, which perf.sweep wrote on a GPU; a variant without a line there is not measured.
"""

import argparse
import datetime
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from fa3.inspect.cli import features, inspect
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import Q_BLOCK, Signature
from fa3.launch import tuning

from .backends import OURS
from .cases import BACKWARD, DTYPES, TRAINING
from .check import attention, visible_keys
from .document import insert, table
from .progress import track
from .results import RESULTS, ROOT, Row, read_all
from .sweep import commit
from .variants import QUANTISED, Variant, ampere, backward, shipped

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


def every() -> list[Variant]:
    """What the table has a line of; of Ampere only what makes plain calls."""
    plain = [v for v in ampere() if not (features(v.signature) or v.signature.is_ragged)]
    return [*map(Variant, shipped()), *backward(), *plain]


def compiled(variant: Variant) -> tuple[str, str, str, str]:
    """Compile and read the SASS: tile, stages, local memory in bytes, slots per exp.

    The slots are those of the steady main loop, per exponential of one thread.
    """
    found = inspect(variant.signature, target=variant.target)
    config, report = found.config, found.report
    if report.serialised:
        raise RuntimeError(f"{variant.name}: ptxas runs its warpgroup MMAs one by one")
    slots = f"{report.slots_per_exponential:.2f}" if report.steady else "-"
    tile = f"{config.tile_m} x {config.tile_n}"
    return tile, str(config.num_stages), str(report.resources.frame), slots


def emulated(variant: Variant) -> tuple[float, float]:
    """Run on the emulator with all checks: the largest errors against fp32, ours and torch's own.

    torch's is that of the same formula with every step in the variant's dtype. Of a backward pass
    they are those of dq, dk and dv.
    """
    import fa3

    torch.manual_seed(0)
    signature = variant.signature
    heads, widths = 2, (signature.head_dim, signature.head_dim, signature.head_dim_v)
    shapes = zip((S_Q, S_K, S_K), widths, strict=True)
    q, k, v = (torch.randn(1, length, heads, width) for length, width in shapes)
    attend = _attend_16_bit if signature.quantised is None else _attend_one_byte
    if isinstance(signature, BwdSignature):
        attend = _differentiate
    with fa3.emulator.options(checks=fa3.emulator.ALL_CHECKS):
        out, exact, plain = attend(signature, q, k, v)
    ours, torchs = ((x.float() - exact).abs().max().item() for x in (out, plain))
    if not ours <= 2 * torchs:
        name = variant.name
        raise RuntimeError(f"{name}: largest error {ours:.2g}, torch's own is {torchs:.2g}")
    return ours, torchs


def _differentiate(signature: BwdSignature, *inputs) -> tuple:
    """dq, dk and dv, flat: the kernel's, those of fp32, those of torch."""
    import fa3

    causal, window = _mask(signature)
    leaves = [x.to(DTYPES[signature.dtype]).requires_grad_() for x in inputs]
    options = {"causal": causal, "window_size": window, "deterministic": signature.deterministic}
    out = fa3.flash_attn_func(*leaves, **options)
    dout = torch.randn_like(out)
    seen = visible_keys(S_Q, S_K, window[0], 0 if causal else window[1])

    def plain(*tensors):
        return attention(*(x[0].transpose(0, 1) for x in tensors), seen).transpose(0, 1)[None]

    wide = [x.detach().float().requires_grad_() for x in leaves]
    results = (out, leaves), (plain(*wide), wide), (plain(*leaves), leaves)
    return tuple(
        torch.cat([x.flatten() for x in torch.autograd.grad(y, given, dout.to(y.dtype))])
        for y, given in results
    )


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


def _mask(signature) -> tuple[bool, tuple[int, int]]:
    return signature.mask == "causal", WINDOW if signature.mask == "local" else (-1, -1)


def _per_element(descale, x):
    """(b, h) or (b, h, blocks) -> (b, s, h, 1)"""
    if descale.dim() == 2:
        return descale[:, None, :, None]
    block = Q_BLOCK  # of q; that of k and v is the same here
    return descale.repeat_interleave(block, 2)[:, :, : x.shape[1]].transpose(1, 2)[..., None]


def measured(variant: Variant, folder: Path = RESULTS) -> tuple[str, str]:
    """(device and date, TFLOPs/s and length) of the newest sweep at the longest length."""
    found = [(row, machine) for row, machine in read_all(folder) if _is_of(row, variant)]
    if not found:
        return NOT_MEASURED, NOT_MEASURED
    row, machine = max(found, key=lambda pair: (pair[0].length, pair[1].date))
    return f"{machine.device}, {machine.date[:10]}", f"{row.tflops:.0f} at {row.length}"


def _is_of(row: Row, variant: Variant) -> bool:
    if variant.arch != "sm_90a":
        return False  # a Hopper GPU runs these kernels compiled for itself
    signature, gradients = variant.signature, (BACKWARD, TRAINING)
    is_backward = isinstance(signature, BwdSignature)
    if (row.of_pass == BACKWARD) != is_backward or (row.of_pass in gradients) != is_backward:
        return False
    mask = "causal" if row.causal else "full"
    wanted = signature.dtype, signature.head_dim, signature.head_dim_v, signature.mask
    is_timed = row.backend == OURS and row.tflops is not None
    if signature.quantised not in (None, QUANTISED["block scales"]) or features(signature):
        return False  # the sweep times what calls get by default
    return is_timed and (row.dtype, row.head_dim, row.head_dim, mask) == wanted


def rows(variants: list[Variant]):
    """A table row per variant; whatever fails ends the run."""
    for variant in track(variants, "variant"):
        ours, torchs = emulated(variant)
        read = compiled(variant)
        errors = f"{ours:.1e}", f"{torchs:.1e}"
        yield (variant.name, *read, *errors, *measured(variant))


def markdown(table_rows, made: list[str]) -> str:
    return "\n".join([BEGIN, "", *made, "", table(COLUMNS, table_rows), "", END])


def written(document: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Of the generated part: the lines that say when rows were made, and the rows by variant."""
    lines = document.partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [tuple(re.split(r" *\| *", line.strip("| "))) for line in lines if "|" in line]
    return [line for line in lines if line and "|" not in line], {x[0]: x for x in cells[2:]}


def made_now(made: list[str], what: str) -> list[str]:
    """With a line for rows made now in place of the earlier one of such rows."""
    now = (
        f"{what}{datetime.date.today()}, commit {commit()}: nvidia-cutlass-dsl "
        f"{version('nvidia-cutlass-dsl-libs-base')}, torch {torch.__version__}.  "
    )
    if not what:
        return [now.rstrip()]
    return [*(line for line in made if not line.startswith(what)), now]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names: only these")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    os.environ["FA3_CPU"] = "emulate"
    arch, words = os.environ.get("FA3_ARCH", "sm_90a"), options.words
    chosen = [
        variant
        for variant in every()
        if variant.arch == arch and set(words) <= set(re.split(r"[ ,]+", variant.name))
    ]
    found = {row[0]: row for row in rows(chosen)}
    made, old = written(DOCUMENT.read_text())
    of = words if arch == "sm_90a" else [arch, *words]
    made = made_now(made, f"Rows of {' '.join(of)}: " if of else "")
    known = old | found
    text = markdown([known[v.name] for v in every() if v.name in known], made)
    if options.check:
        print(text)
    else:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), text))
        print(f"{len(found)} variants, written: {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
