"""Text generation from one paged cache: prefill in chunks, decoding, and checking of guesses.

    python docs/examples/generate.py            on a Hopper GPU, or the same kernels on the emulator

A small language model with random weights (rotary embeddings, grouped heads) generates bytes for
three prompts of different lengths at once. All that its layers remember is in pages of 16 tokens,
handed out as sequences grow, in whatever order they come. The same model without a cache, with
attention in plain torch, must give the same logits; guesses that are checked four at a time must
change no byte. Ends with an error otherwise.
"""

import os
import sys

import torch
import torch.nn.functional as F

PROMPTS = (
    b"Attention compares every query with every key.",
    b"A page holds sixteen tokens, wherever it is in memory.",
    b"Short.",
)
CHUNK = 24  # tokens of the prompts per step
DECODED, GUESSES = 6, 4
LAYERS, HEADS, KEY_HEADS, HEAD_DIM, BYTES = 2, 4, 2, 64, 256
WIDTH, PAGE, NUM_PAGES, POSITIONS = HEADS * HEAD_DIM, 16, 32, 256
TOLERANCE = 0.02  # of logits, which are about 1: bf16 has 8 bits


class Model:
    """The weights, and a step of the model for any attention."""

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(0)

        def weight(rows, columns):
            return (torch.randn(rows, columns, generator=generator) * rows**-0.5).to(device)

        heads = (HEADS + 2 * KEY_HEADS) * HEAD_DIM
        self.embedding = weight(BYTES, WIDTH) * BYTES**0.5
        self.layers = [
            (
                weight(WIDTH, heads),
                weight(WIDTH, WIDTH),
                weight(WIDTH, 2 * WIDTH),
                weight(2 * WIDTH, WIDTH),
            )
            for _ in range(LAYERS)
        ]
        self.head = weight(WIDTH, BYTES)

    def __call__(self, tokens: torch.Tensor, attention) -> torch.Tensor:
        """Logits of tokens (n,); attention(layer, q, k, v) takes and gives (n, heads, HEAD_DIM)."""
        x = self.embedding[tokens]
        for i, (qkv, out, up, down) in enumerate(self.layers):
            heads = (norm(x) @ qkv).unflatten(-1, (-1, HEAD_DIM))
            parts = heads.split([HEADS, KEY_HEADS, KEY_HEADS], dim=-2)
            x = x + attention(i, *(part.bfloat16() for part in parts)).flatten(-2).float() @ out
            x = x + F.gelu(norm(x) @ up) @ down
        return norm(x) @ self.head


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (WIDTH,))


def rotary(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (POSITIONS, HEAD_DIM / 2)."""
    speed = 10000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angle = torch.arange(POSITIONS)[:, None] * speed
    return angle.cos().bfloat16().to(device), angle.sin().bfloat16().to(device)


class PagedCache:
    """Pages of keys and values for all layers, and the table that says whose they are."""

    def __init__(self, batch: int, device: str):
        shape = LAYERS, 2, NUM_PAGES, PAGE, KEY_HEADS, HEAD_DIM
        self.pages = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.free = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(1)).tolist()
        self.table = torch.full((batch, NUM_PAGES), -1, dtype=torch.int32)
        self.lengths = [0] * batch
        self.device = device

    def grow(self, counts: list[int]) -> None:
        """See that each sequence has pages for so many more tokens."""
        for i, count in enumerate(counts):
            for page in range(-(-self.lengths[i] // PAGE), -(-(self.lengths[i] + count) // PAGE)):
                if self.table[i, page] < 0:
                    self.table[i, page] = self.free.pop()

    def attention(self, counts: list[int], angles):
        """attention() of a step in which sequence i has counts[i] tokens, packed."""
        import fa3

        self.grow(counts)
        ends = torch.tensor([0, *counts]).cumsum(0).int().to(self.device)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)

        def attend(layer, q, k, v):
            return fa3.flash_attn_with_kvcache(
                q,
                *self.pages[layer],
                k,
                v,
                *(None, *angles),
                cache_seqlens=lengths,
                page_table=self.table.to(self.device),
                cu_seqlens_q=ends,
                cu_seqlens_k_new=ends,
                max_seqlen_q=max(counts),
                causal=True,
                rotary_interleaved=False,
            )

        return attend


def without_cache(angles):
    """The same in plain torch, of one sequence from its beginning, in fp32."""

    def turn(x):
        cos, sin = (angle[: len(x), None].float() for angle in angles)
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (turn(q), turn(k), v.float()))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            0, 1
        )

    return attend


class Generation:
    """The sequences, and the largest difference of a logit to the model without a cache."""

    def __init__(self, model: Model, device: str):
        self.model, self.angles, self.device = model, rotary(device), device
        self.cache = PagedCache(len(PROMPTS), device)
        self.texts = [list(prompt) for prompt in PROMPTS]
        self.difference = 0.0

    def step(self, new: list[list[int]]) -> list[torch.Tensor]:
        """Logits of new tokens of each sequence, which join the cache."""
        counts = [len(tokens) for tokens in new]
        tokens = torch.tensor([x for tokens in new for x in tokens], device=self.device)
        logits = self.model(tokens, self.cache.attention(counts, self.angles)).split(counts)
        for i, count in enumerate(counts):
            if count:
                self._compare(i, new[i], logits[i])
            self.cache.lengths[i] += count
        return list(logits)

    def _compare(self, i: int, tokens: list[int], logits: torch.Tensor) -> None:
        known = self.texts[i][: self.cache.lengths[i]]
        alone = self.model(
            torch.tensor(known + tokens, device=self.device), without_cache(self.angles)
        )
        difference = (alone[-len(tokens) :] - logits).abs().max().item()
        self.difference = max(self.difference, difference)

    def prefill(self) -> None:
        """Chunk by chunk; the last token of each prompt is left for decode()."""
        longest = max(map(len, PROMPTS))
        for start in range(0, longest - 1, CHUNK):
            self.step([list(p[start : min(start + CHUNK, len(p) - 1)]) for p in PROMPTS])

    def decode(self) -> None:
        """A token for each sequence."""
        logits = self.step([text[-1:] for text in self.texts])
        for text, x in zip(self.texts, logits, strict=True):
            text.append(int(x[-1].argmax()))

    def check_guesses(self, guesses: list[list[int]]) -> list[int]:
        """The last token and guesses after it in one step; keeps those that the model would choose.

        Rows of the cache beyond the length that is kept are written over by the next step.
        """
        lengths = list(self.cache.lengths)
        given = [[text[-1], *guess] for text, guess in zip(self.texts, guesses, strict=True)]
        kept = []
        for i, logits in enumerate(self.step(given)):
            chosen = logits.argmax(-1).tolist()
            count = 0
            while count < len(guesses[i]) and chosen[count] == guesses[i][count]:
                count += 1
            self.texts[i] += chosen[: count + 1]
            self.cache.lengths[i] = lengths[i] + count + 1
            kept.append(count)
        return kept


def main() -> int:
    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if not on_gpu:
        os.environ.setdefault("FA3_CPU", "emulate")
    device = "cuda" if on_gpu else "cpu"
    model = Model(device)

    plain = Generation(model, device)
    plain.prefill()
    for _ in range(DECODED):
        plain.decode()
    print(f"prompts of {', '.join(str(len(p)) for p in PROMPTS)} bytes in chunks of {CHUNK}")
    print(f"{DECODED} bytes each, one at a time: {[bytes(t[-DECODED:]) for t in plain.texts]}")

    guessed = Generation(model, device)
    guessed.prefill()
    first = [text[len(p) :] for text, p in zip(plain.texts, PROMPTS, strict=True)]
    guesses = [x[:GUESSES] for x in first]
    guesses[1] = [
        *first[1][:2],
        *((x + 1) % BYTES for x in first[1][2:GUESSES]),
    ]  # half of it wrong
    kept = guessed.check_guesses(guesses)
    print(f"{GUESSES} guesses each, checked at once; kept: {kept}")
    guessed.decode()

    agree = all(a[: len(b)] == b[: len(a)] for a, b in zip(plain.texts, guessed.texts, strict=True))
    difference = max(plain.difference, guessed.difference)
    where = torch.cuda.get_device_name() if on_gpu else "CPU, the emulator of sm_90a"
    print(f"ran on: {where}")
    print(f"largest difference of a logit to the model without a cache: {difference:.4f}")
    print(f"both ways choose the same bytes: {agree}")
    return 0 if agree and difference < TOLERANCE and kept == [GUESSES, 2, GUESSES] else 1


if __name__ == "__main__":
    sys.exit(main())
