"""The registers of a warpgroup: by class as arrays (registers, lanes), each also as a row."""

from __future__ import annotations

import numpy as np


class Banks:
    """Made once for all CTAs of a launch: thousands of rows take longer than the CTA may."""

    def __init__(self, counts: dict[str, int], lanes: int):
        """counts: registers by class, w (32 bits), d (64), h (16) and p (predicates)."""
        words, doubles, halves, predicates = self._arrays = [
            np.empty((counts.get(cls, 0), lanes), dtype)
            for cls, dtype in zip("wdhp", (np.uint32, np.uint64, np.uint16, bool), strict=True)
        ]
        ints, floats = words.view(np.int32), words.view(np.float32)
        self.named = {
            "words": words,
            "ints": ints,
            "floats": floats,
            "predicates": predicates,
            **{"U": list(words), "S": list(ints), "F": list(floats)},
            **{
                "D": list(doubles),
                "Q": list(doubles.view(np.int64)),
                "E": list(doubles.view(float)),
            },
            **{"H": list(halves), "J": list(halves.view(np.int16))},
            **{"G": list(halves.view(np.float16)), "P": list(predicates)},
        }

    def clear(self, poison: bool) -> None:
        """As at the start of a CTA."""
        words, *others = self._arrays
        words.fill(0xFFFFFFFF if poison else 0)
        for array in others:
            array.fill(0)
