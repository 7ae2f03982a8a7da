"""Matrix element types: storage and value."""

from __future__ import annotations

import numpy as np

from ..numerics.formats import FP8, bf16_to_f32

# PTX type -> (bytes, dtype in memory)
ELEMENT = {
    "f16": (2, np.float16),
    "bf16": (2, np.uint16),
    "tf32": (4, np.float32),
    "e4m3": (1, np.uint8),
    "e5m2": (1, np.uint8),
    "s8": (1, np.int8),
    "u8": (1, np.uint8),
}


def decode(x: np.ndarray, kind: str) -> np.ndarray:
    """Stored elements -> float32, integers -> float64, whose sums stay exact."""
    if kind == "bf16":
        return bf16_to_f32(x)
    if kind in FP8:
        return FP8[kind][x]
    return x.astype(np.float64 if kind in ("s8", "u8") else np.float32)
