"""`python -m perf.ring`: what fa3.distributed costs by the number of GPUs, for docs/torch.md.

Formulas, nothing measured: operations and bytes of one layer of causal attention. test_ring.py
compares the bytes with what is sent.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).resolve().parents[1] / "docs" / "figures" / "ring.png"
GPUS = (1, 2, 4, 8, 16, 32, 64)
FP32 = 4  # bytes


@dataclass(frozen=True)
class Layer:
    """Attention of one layer; the length is that of the whole sequence."""

    length: int
    h_q: int = 32
    h_k: int = 8
    d: int = 128
    batch: int = 1
    itemsize: int = 2

    @property
    def key_elements(self) -> int:
        """Of k and v together."""
        return 2 * self.batch * self.length * self.h_k * self.d

    def forward_bytes(self, gpus: int) -> float:
        """That each GPU sends: its part of k and v, and those of others on their way."""
        return (gpus - 1) / gpus * self.key_elements * self.itemsize

    def backward_bytes(self, gpus: int) -> float:
        """The same again, and gradients in fp32, which take one step more: home."""
        gradients = self.key_elements * FP32 if gpus > 1 else 0
        return self.forward_bytes(gpus) + gradients

    def forward_operations(self, gpus: int) -> float:
        """Of each GPU, in zigzag order: two products for each pair that is seen."""
        return 4 * self.batch * self.h_q * self.d * self.length**2 / 2 / gpus


def speed_up(order: str, gpus: int) -> float:
    """How many times less the busiest GPU computes than one alone, of causal attention."""
    return gpus if order == "zigzag" else gpus**2 / (2 * gpus - 1)


def draw():
    """The figure, of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    work, sent, ratio = figure.subplots(1, 3)
    for order, colour in (("zigzag", "#c0392b"), ("contiguous", "#2c3e50")):
        values = [speed_up(order, n) for n in GPUS]
        work.plot(GPUS, values, "o-", color=colour, markersize=4, label=order)
    work.set_title("causal: work of one GPU alone,\nover that of the busiest of n", fontsize=10)
    layer = Layer(131_072)
    for name, function, colour in (
        ("forward", layer.forward_bytes, "#2980b9"),
        ("backward", layer.backward_bytes, "#8e44ad"),
    ):
        values = [function(n) / 2**20 for n in GPUS]
        sent.plot(GPUS, values, "o-", color=colour, markersize=4, label=name)
    sent.set_title(
        "MiB sent by each GPU, one layer:\n128k tokens, 8 key heads, d = 128", fontsize=10
    )
    sent.set_ylim(0)
    for length, colour in ((32_768, "#27ae60"), (131_072, "#2980b9"), (1_048_576, "#8e44ad")):
        layer = Layer(length)
        values = [layer.forward_operations(n) / layer.forward_bytes(n) for n in GPUS[1:]]
        name = f"{length // 1024}k tokens"
        ratio.plot(GPUS[1:], values, "o-", color=colour, markersize=4, label=name)
    ratio.set_title("forward: operations per byte sent,\n32 query heads on 8", fontsize=10)
    ratio.set_yscale("log")
    work.set_yscale("log", base=2)
    for axis in (work, sent, ratio):
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS, [str(n) for n in GPUS])
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    work.set_yticks(GPUS, [str(n) for n in GPUS])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.ring", description=__doc__)
    parser.add_argument("--out", type=Path, default=PATH, help="file (docs/figures/ring.png)")
    args = parser.parse_args()
    draw().savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
