"""Which calls with one-byte inputs the accuracy tests make: several of each of a few kernels."""

import itertools
from dataclasses import dataclass

import torch

from fa3.call.mask import MaskSpec
from fa3.kernels.signature import MaskKind, Quantised, Signature, head_dim_tile

from .cases import SINKS, Bordered, CallCase, pairwise
from .fp8_calls import E4M3, E5M2, INT8

DTYPES = {
    "e4m3": E4M3,
    "e5m2": E5M2,
    "int8": INT8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
LARGE = 40.0  # integers that have scales


@dataclass(frozen=True)
class Fp8Case(CallCase):
    """One call of flash_attn_func; its repr is an expression that makes it again.

    Forms of scales: "none", "head", "64", "128"; "128" of q, "channels" of v.
    """

    dtypes: tuple[str, str, str] = ("e4m3", "e4m3", "e4m3")  # of q, k, v
    out: str = "bf16"
    head_dim: int = 64
    head_dim_v: int = 64
    batch: int = 1
    h_q: int = 2
    h_k: int = 2
    s_q: int = 128
    s_k: int = 128
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scales: tuple[str, str, str] = ("128", "128", "128")  # of q, k, v
    layout: str = "bshd"
    strided_scales: bool = False
    shifted: bool = False  # v
    softmax_scale: float | None = None
    num_ctas: int | None = None  # None: one per SM
    softcap: float = 0.0
    sink: str | None = None  # one of SINKS
    num_splits: int = 1

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def signature(self) -> Signature:
        """That of the kernel it needs."""
        q, k, v = self.dtypes
        kind = MaskSpec.of(self.causal, *self.window).kind
        k_block, v_block = (self._block(form) for form in self.scales[1:])
        quantised = Quantised(k, v, self.out, k_block, v_block)
        tiles = head_dim_tile(self.head_dim), head_dim_tile(self.head_dim_v)
        score = "softcap" if self.softcap else None
        return Signature(q, *tiles, kind, quantised, score=score, sinks=self.sink is not None)

    def _block(self, form: str) -> int:
        """Up to 64 keys are one block, of either size."""
        return {"64": 64 if self.s_k > 64 else 128, "128": 128}.get(form, 0)

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of q, k and v."""
        return [
            (self.batch, self.s_q, self.h_q, self.head_dim),
            (self.batch, self.s_k, self.h_k, self.head_dim),
            (self.batch, self.s_k, self.h_k, self.head_dim_v),
        ]

    def inputs(self, device) -> list[Bordered]:
        """q, k and v; integers are such that their scores are moderate with and without scales."""
        tensors = []
        for shape, dtype, form in zip(self.shapes, self.dtypes, self.scales, strict=True):
            x = torch.randn(shape)
            if dtype == "int8":
                x = (x if form == "none" else LARGE * x).round().clamp(-127, 127)
            tensors.append(Bordered(x.to(DTYPES[dtype]).to(device), self.layout))
        return tensors

    def descales(self, device) -> dict[str, torch.Tensor]:
        """By argument, those that are not "none"; between 2/3 and 3/2, of integers a small part.

        Also v_shift.
        """
        given = {}
        for i, (dtype, form) in enumerate(zip(self.dtypes, self.scales, strict=True)):
            if form == "none":
                continue
            _, length, heads, width = self.shapes[i]
            if form == "head":
                shape = (self.h_k,)
            elif form == "channels":
                shape = (heads, 1, width)
            else:
                shape = (heads, -(-length // int(form)))
            x = 1.5 ** (2 * torch.rand(self.batch, *shape, device=device) - 1)
            x /= LARGE if dtype == "int8" else 1.0
            if self.strided_scales:
                x = torch.stack([torch.full_like(x, torch.nan), x], dim=-1)[..., 1]
            given[f"{'qkv'[i]}_descale"] = x
        if self.shifted:
            shape = self.batch, self.h_k, self.head_dim_v
            given["v_shift"] = torch.randn(shape, device=device)
        return given


# Tiles -> head dims of q and k, of v. The first ones get most kernels.
HEAD_DIMS = {
    (64, 64): ((64, 64), (48, 16), (16, 48)),
    (96, 96): ((96, 96), (80, 80), (80, 96)),
    (128, 128): ((128, 128), (112, 128), (128, 112)),
    (192, 128): ((192, 128), (192, 128), (160, 112)),
    (64, 128): ((64, 128), (64, 128), (32, 112)),
    (192, 192): ((192, 192), (160, 160), (144, 176)),
    (256, 256): ((256, 256), (208, 240), (240, 224)),
}
WINDOWS: dict[MaskKind, tuple] = {  # causal, window
    "full": ((False, (-1, -1)),),
    "causal": ((True, (-1, -1)), (False, (-1, 0))),
    "local": ((False, (30, 20)), (True, (100, -1)), (False, (-1, 40))),
}
KERNEL_FACTORS = {
    "qk": (("e4m3", "e4m3"), ("e4m3", "e5m2"), ("int8", "int8")),
    "v": ("e4m3", "e5m2"),
    "out": ("bf16", "fp16", "fp32"),
    "mask": tuple(WINDOWS),
    "k_block": (0, 64, 128),
    "v_block": (0, 64, 128),
    "score": (None, "softcap"),
    "sinks": (False, True),
}
SOFTCAPS = (50.0, 20.0)
LENGTHS = (  # s_q, s_k
    (1, 1),
    (2, 300),
    (64, 63),
    (65, 64),
    (127, 128),
    (128, 65),
    (129, 127),
    (63, 200),
    (200, 129),
    (200, 260),
    (260, 200),
)
CALL_FACTORS = {
    "lengths": LENGTHS,
    "heads": ((1, 1), (2, 2), (2, 1), (4, 1)),  # h_q, h_k
    "layout": ("bshd", "bhsd", "packed", "expanded"),
    "q": ("none", "head", "128"),
    "k": ("none", "head"),  # where the kernel takes no blocks
    "v": ("none", "head", "channels"),
    "dims": (0, 1, 2),
    "batch": (1, 2),
    "strided_scales": (False, True),
    "shifted": (False, True),
    "softmax_scale": (None, 0.3, 3.0),
    "num_ctas": (None, 3),
}


def kernels(seed: int) -> list[dict]:
    """Any two values of any two KERNEL_FACTORS meet; the tiles take turns."""
    tiles = list(HEAD_DIMS)
    rows = pairwise(KERNEL_FACTORS, seed)
    return [row | {"tiles": tiles[i % len(tiles)]} for i, row in enumerate(rows)]


def covering(kernel_seed: int = 4, call_seed: int = 1) -> list[Fp8Case]:
    """Any two values of CALL_FACTORS meet, in calls that are spread over the kernels.

    Of the kernels with the fewest calls each takes the one whose factors it meets first.
    """
    rows, met, cases = kernels(kernel_seed), set(), []
    counts = [0] * len(rows)
    for call in pairwise(CALL_FACTORS, call_seed):
        pairs = [set(itertools.product(row.items(), call.items())) - met for row in rows]
        fitting = [i for i, row in enumerate(rows) if _fits(row, call)]
        chosen = min(fitting, key=lambda i: (counts[i], -len(pairs[i])))  # noqa: B023
        counts[chosen] += 1
        met |= pairs[chosen]
        cases.append(_case(rows[chosen], call, counts[chosen]))
    return sorted(cases, key=lambda case: repr(case.signature))


def _fits(kernel: dict, call: dict) -> bool:
    """Up to 64 keys are one block of 128, too: they make no kernel of their own."""
    return call["lengths"][1] > 64 or 64 not in (kernel["k_block"], kernel["v_block"])


def _case(kernel: dict, call: dict, count: int) -> Fp8Case:
    masks = WINDOWS[kernel["mask"]]
    causal, window = masks[count % len(masks)]
    head_dim, head_dim_v = HEAD_DIMS[kernel["tiles"]][call["dims"]]
    forms = (str(kernel[f"{x}_block"]) if kernel[f"{x}_block"] else call[x] for x in "kv")
    return Fp8Case(
        dtypes=(*kernel["qk"], kernel["v"]),
        out=kernel["out"],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        batch=2 if call["layout"] == "expanded" else call["batch"],
        h_q=call["heads"][0],
        h_k=call["heads"][1],
        s_q=call["lengths"][0],
        s_k=call["lengths"][1],
        causal=causal,
        window=window,
        scales=(call["q"], *forms),
        layout=call["layout"],
        strided_scales=call["strided_scales"],
        shifted=call["shifted"],
        softmax_scale=call["softmax_scale"],
        num_ctas=call["num_ctas"],
        softcap=SOFTCAPS[count % 2] if kernel["score"] else 0.0,
        sink=SINKS[1 + count % (len(SINKS) - 1)] if kernel["sinks"] else None,
    )
