"""Small: problems whose inputs are the same numbers on every machine."""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fa3.call.mask import MaskSpec

from ..cases import DTYPES

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
UNIT = {"e4m3": 2, "int8": 8}  # of a code, in sums of four drawn integers: codes to 256 and 64
Q_BLOCK = K_BLOCK = 128  # rows per scale
UPSTREAM = 10**6  # added to a seed


@dataclass(frozen=True)
class Small:
    """A problem whose inputs come from the seed.

    q (batch, s_q, h_q, head_dim), k (batch, s_k, h_k, head_dim), v (batch, s_k, h_k, head_dim_v)
    """

    dtype: str  # of q
    head_dim: int
    head_dim_v: int
    s_q: int
    s_k: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    batch: int = 1
    h_q: int = 2
    h_k: int = 1
    seed: int = 0
    scales: Literal["", "block", "head"] = ""  # of one-byte inputs

    def __str__(self) -> str:
        dims = f"d{self.head_dim}" + f"/{self.head_dim_v}" * (self.head_dim != self.head_dim_v)
        scales = f" {self.scales} scales" if self.scales else ""
        lengths = f"{self.s_q}x{self.s_k} h{self.h_q}/{self.h_k}"
        return f"{self.dtype} {dims} {self.mask} {lengths}{scales}"

    @property
    def mask(self) -> str:
        return MaskSpec.of(self.causal, *self.window).kind

    def inputs(self, device="cpu") -> tuple[Tensor, ...]:
        """q, k, v and, for one-byte inputs, their descales.

        Sums of four integers over 128: nearly normal, and free of any rounding but the dtype's;
        descales with four bits. They are drawn on the CPU, so that no other kernel runs on the
        device.
        """
        draw = np.random.RandomState(self.seed)  # its stream is frozen
        shapes = (
            (self.batch, self.s_q, self.h_q, self.head_dim),
            (self.batch, self.s_k, self.h_k, self.head_dim),
            (self.batch, self.s_k, self.h_k, self.head_dim_v),
        )
        sums = [draw.randint(-128, 128, size=(4, *shape)).sum(0) for shape in shapes]
        if not self.scales:
            values = [torch.from_numpy(x.astype(np.float32) / 128) for x in sums]
            return tuple(x.to(DTYPES[self.dtype]).to(device) for x in values)
        dtypes = self.dtype, self.dtype, "e4m3"  # v is e4m3 beside int8, too
        codes = [_codes(x, dtype) for x, dtype in zip(sums, dtypes, strict=True)]
        parts = zip(self._scale_shapes(), dtypes, strict=True)
        descales = [_descale(draw, shape, dtype) for shape, dtype in parts]
        return tuple(x.to(device) for x in (*codes, *descales))

    def _scale_shapes(self):
        if self.scales == "head":
            return ((self.batch, self.h_k),) * 3
        of_q = self.batch, self.h_q, -(-self.s_q // Q_BLOCK)
        of_k = self.batch, self.h_k, -(-self.s_k // K_BLOCK)
        return of_q, of_k, of_k


def upstream(case: Small, device="cpu") -> Tensor:
    """The gradient of its output, (batch, s_q, h_q, head_dim_v)."""
    other = replace(case, head_dim=case.head_dim_v, s_k=1, seed=case.seed + UPSTREAM)
    return other.inputs(device)[0]


def _codes(sums: np.ndarray, dtype: str) -> Tensor:
    if dtype == "int8":
        return torch.from_numpy((sums // UNIT[dtype]).astype(np.int8))
    return torch.from_numpy(sums.astype(np.float32) / UNIT[dtype]).to(DTYPES[dtype])


def _descale(draw: np.random.RandomState, shape: tuple[int, ...], dtype: str) -> Tensor:
    """1 to 1.875 times what makes the codes nearly normal."""
    eighths = 8 + draw.randint(0, 8, size=shape)
    return torch.from_numpy(eighths.astype(np.float32) / 8 * UNIT[dtype] / 128)


def decoded(q: Tensor, k: Tensor, v: Tensor, *descales: Tensor) -> list[Tensor]:
    """What inputs stand for: q, k and v in fp32."""
    if not descales:
        return [x.float() for x in (q, k, v)]
    rows = Q_BLOCK, K_BLOCK, K_BLOCK
    parts = zip((q, k, v), descales, rows, strict=True)
    return [x.float() * _by_rows(descale, x, n) for x, descale, n in parts]


def _by_rows(descale: Tensor, x: Tensor, rows: int) -> Tensor:
    """(b, h or h_k) or (b, h, blocks of rows) -> (b, s or 1, h, 1) of x (b, s, h, d)."""
    if descale.dim() == 2:
        per_head = descale.repeat_interleave(x.shape[2] // descale.shape[1], dim=1)
        return per_head[:, None, :, None]
    return descale.repeat_interleave(rows, dim=2)[:, :, : x.shape[1]].mT[..., None]


def digest(tensors) -> str:
    """Of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.cpu().contiguous().view(BITS[tensor.element_size()])
        found.update(bits.numpy().tobytes())
    return found.hexdigest()[:16]
