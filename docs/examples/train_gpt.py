"""A small GPT trained twice from the same seed: with fa3's attention, and with torch's.

    python docs/examples/train_gpt.py                     on a Hopper GPU: 300 steps, and tokens/s
    python docs/examples/train_gpt.py --tiny              a few steps of a tiny one
    python docs/examples/train_gpt.py --chart curves.png  draws both curves

Two layers, grouped heads, causal; it predicts the next byte of text that every Python has, the
docstrings of its standard library. Attention in bf16, everything else in fp32. Without a GPU the
kernels run on the CPU emulator, at tiny size. Prints both losses, and ends with an error where
they are further apart than the rounding of bf16 explains.
"""

import argparse
import ast
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODULES = ("argparse", "datetime", "fractions", "random", "statistics", "textwrap", "typing")
MOST = 0.05  # difference of the losses at a step


@dataclass(frozen=True)
class Size:
    width: int = 128
    layers: int = 2
    heads: int = 4
    heads_kv: int = 2
    length: int = 256  # tokens of a sequence
    batch: int = 16
    steps: int = 300


TINY = Size(width=64, heads=2, heads_kv=1, length=48, batch=1, steps=6)
HEAD_DIM = 64


def fa3_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import fa3

    return fa3.flash_attn_func(q, k, v, causal=True)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


class Block(nn.Module):
    def __init__(self, size: Size, attention: Callable):
        super().__init__()
        self.size, self.attention = size, attention
        rows = HEAD_DIM * (size.heads + 2 * size.heads_kv)
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.qkv = nn.Linear(size.width, rows, bias=False)
        self.out = nn.Linear(HEAD_DIM * size.heads, size.width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, s, width)."""
        size = self.size
        heads = self.qkv(self.norms[0](x)).bfloat16().unflatten(-1, (-1, HEAD_DIM))
        q, k, v = heads.split([size.heads, size.heads_kv, size.heads_kv], dim=2)  # (b, s, h, d)
        x = x + self.out(self.attention(q, k, v).flatten(2).float())
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    def __init__(self, size: Size, attention: Callable):
        super().__init__()
        self.tokens = nn.Embedding(256, size.width)
        self.places = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size, attention) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, s) bytes -> (b, s, 256)."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


def text() -> bytes:
    """The docstrings of MODULES, one after another."""
    folder, found = Path(sysconfig.get_path("stdlib")), []
    for module in MODULES:
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
        found += [doc for node in nodes if (doc := ast.get_docstring(node))]
    return "\n\n".join(found).encode()


def train(size: Size, attention: Callable, device: str, seed: int) -> tuple[list[float], float]:
    """The loss of each step, and tokens per second, of which the first step is left out."""
    torch.manual_seed(seed)
    model = Gpt(size, attention).to(device)
    for name, parameter in model.named_parameters():
        if name.endswith(("tokens.weight", "places.weight")):
            nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    place = torch.Generator().manual_seed(seed)
    losses, start = [], time.perf_counter()
    for step in range(size.steps):
        begin = torch.randint(len(data) - size.length, (size.batch, 1), generator=place)
        window = data[begin + torch.arange(size.length + 1)].to(device)
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step == 0:
            losses[0].item()  # waits for the device, as the last one does
            start = time.perf_counter()
    values = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    return values, (size.steps - 1) * size.batch * size.length / seconds


def draw(path: Path, curves: dict[str, list[float]], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    styles = zip(curves.items(), ("#c0392b", "#2c3e50"), ("-", "--"), strict=True)
    for (name, losses), colour, line in styles:
        axis.plot(range(1, len(losses) + 1), losses, line, color=colour, label=name)
    axis.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="the size for the emulator")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chart", type=Path, help="where to draw the losses (PNG)")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if not on_gpu:
        os.environ.setdefault("FA3_CPU", "emulate")
    device = "cuda" if on_gpu else "cpu"
    size = Size() if on_gpu and not options.tiny else TINY
    if options.steps is not None:
        size = replace(size, steps=options.steps)
    if size.steps < 2:
        parser.error(f"--steps is {size.steps}, expected at least 2")

    parameters = sum(x.numel() for x in Gpt(size, torch_attention).parameters())
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, FA3_CPU={os.environ['FA3_CPU']}"
    what = f"{parameters:,} parameters, {size.steps} steps of {size.batch} x {size.length} bytes"
    print(f"{what}; {where}")
    attentions = {"fa3": fa3_attention, "torch SDPA": torch_attention}
    curves, speeds = {}, {}
    for name, attention in attentions.items():
        curves[name], speeds[name] = train(size, attention, device, options.seed)
    print(f"\n step  {'fa3':>8}  {'torch':>8}")
    every = max(1, size.steps // 10)
    pairs = list(zip(*curves.values(), strict=True))
    for step, (ours, theirs) in enumerate(pairs, 1):
        if step % every == 0 or step == 1:
            print(f"{step:5}  {ours:8.4f}  {theirs:8.4f}")
    largest = max(abs(a - b) for a, b in pairs)
    print(f"\nlargest difference of the losses: {largest:.2e}")
    if on_gpu:
        print("tokens/s: " + ", ".join(f"{name} {x:,.0f}" for name, x in speeds.items()))
    if options.chart:
        draw(options.chart, curves, f"A GPT of {what}\n{where}")
    if not largest <= MOST:  # a nan fails too
        print(f"FAILED: above {MOST}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
