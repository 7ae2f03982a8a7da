"""A prediction as text, and its last two iterations as a drawing."""

from collections import Counter
from dataclasses import asdict

from .predict import Prediction
from .simulate import Mma, Result

COLUMNS = 116
LETTERS = {"xu": "x", "alu": "a", "fma": "f", "heavy": "f", "lsu": "s", "sums": "s"}


def text(prediction: Prediction) -> str:
    p, r = prediction, prediction.result
    loop, code = p.report.steady, p.report.program.code
    counts = [len(steps) for steps in p.traces]
    beside = ""
    if p.producer:
        where = f"{p.transpose.head:#x} to {p.transpose.latch:#x}"
        beside = f"; {len(p.producer.steps)} of the {p.transpose.what} ({where}) beside"
    shapes = Counter("x".join(map(str, x.mma_shape)) for x in p.traces[-1] if x.is_mma)
    mmas = ", ".join(f"{count} of {shape}" for shape, count in shapes.items())
    what = "with every skippable block" if p.settings.rescale_always else "on the straight way"
    lines = [
        f"{p.report.resources.name[:150]}",
        f"  loop {code[loop.head].address:#x} to {code[loop.latch].address:#x}, "
        f"{len(p.traces)} consumer warpgroups, each {mmas}; instructions {counts} {what}{beside}",
        f"  {p.cycles:.0f} cycles per iteration of the CTA tile; floors: tensor "
        f"{p.tensor_floor:.0f}, MUFU {p.mufu_floor}, issue {p.issue_floor}{_sums(p)}",
        f"  {_memory(p)}",
        f"  tensor core {p.tensor_floor / p.cycles:.1%} of peak; bound: {p.bound}",
        f"  predicted {p.tflops:.0f} TFLOPs/s at {p.settings.clock} GHz with a tail factor of "
        f"{p.settings.tail} (spread over starting skews {r.spread:.1%})",
        f"  loaded {p.loaded_per_cycle:.0f} bytes per cycle and SM",
        f"  busy: {_shares(r.busy)}",
        f"  warp time: {_shares({k: v for k, v in r.stalls.items() if v >= 0.01})}",
        *(f"  warning: {warning}" for warning in p.warnings),
    ]
    return "\n".join(lines)


def summary(prediction: Prediction) -> list[str]:
    """A few lines in the form of `fa3 inspect`, without the warnings, which stand there already."""
    p = prediction
    return [
        f"predicted         {p.tflops:.0f} TFLOPs/s of an H100 on long sequences, "
        "by the timing model (docs/timing_model.md)",
        f"  bound           {p.bound}",
        f"  floors          of {p.cycles:.0f} cycles per step: tensor cores {p.tensor_floor:.0f}, "
        f"exponentials {p.mufu_floor}, issue {p.issue_floor}{_sums(p)}",
        f"  {_memory(p)}",
    ]


def as_dict(prediction: Prediction) -> dict:
    """For JSON."""
    p = prediction
    return {
        "tflops": p.tflops,
        "bound": p.bound,
        "cycles": p.cycles,
        "floors": {
            "tensor": p.tensor_floor,
            "mufu": p.mufu_floor,
            "issue": p.issue_floor,
            "sums_in_l2": p.sums_floor,
        },
        "shared_memory": asdict(p.traffic),
        "busy": p.result.busy,
    }


def _sums(p: Prediction) -> str:
    return f", sums in L2 {p.sums_floor:.0f}" if p.sums.total else ""


def _memory(p: Prediction) -> str:
    return (
        f"shared memory   {p.traffic.total:.0f} cycles per step of {p.tensor_floor:.0f} "
        f"MMA cycles: {p.traffic.told(p.transpose.what if p.transpose else '')}"
    )


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def timeline(result: Result, warps: int, iterations: int = 2) -> str:
    """Two lines a warpgroup: MMAs on the tensor core, and what its warp issues."""
    width = iterations * result.cycles
    start, cell = result.end - width - result.cycles / 2, width / COLUMNS
    lines = []
    for w in range(warps):
        mma, mix = _mma_share(result, w, start, cell), _issue_mix(result, w, start, cell)
        shares = "".join("#" if share > 0.66 else "+" if share > 0.2 else " " for share in mma)
        letters = "".join(_letter(counts, cell) for counts in mix)
        lines += [f"  WG{w} MMA  |{shares}|", f"      issue|{letters}|"]
    lines.append(
        f"  {COLUMNS} columns = {width:.0f} cycles; # tensor core busy for this warpgroup; "
        "x MUFU-rate, a ALU, f FMA, s memory"
    )
    return "\n".join(lines)


def _mma_share(result: Result, warp: int, start: float, cell: float) -> list[float]:
    """Share of each column's time in which the tensor core works for `warp`."""
    shares = [0.0] * COLUMNS
    for event in result.events:
        if not isinstance(event, Mma) or event.warp != warp or event.end < start:
            continue
        first = max(0, int((event.start - start) / cell))
        for column in range(first, min(COLUMNS, int((event.end - start) / cell) + 1)):
            left, right = start + column * cell, start + (column + 1) * cell
            shares[column] += max(0, min(event.end, right) - max(event.start, left)) / cell
    return shares


def _issue_mix(result: Result, warp: int, start: float, cell: float) -> list[Counter]:
    mix = [Counter() for _ in range(COLUMNS)]
    for event in result.events:
        if not isinstance(event, Mma) and event[0] == warp:
            column = int((event[1] - start) // cell)
            if 0 <= column < COLUMNS:
                mix[column][event[2]] += 1
    return mix


def _letter(counts: Counter, cell: float) -> str:
    if sum(counts.values()) < 0.05 * cell:
        return " "
    if counts["xu"] * 8 > 0.5 * cell:
        return "x"
    return LETTERS[counts.most_common(1)[0][0]]
