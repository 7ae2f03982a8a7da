"""Lengths: which rows of q, k and v belong to which sequence.

    cu_seqlens_q, cu_seqlens_k   (b + 1,) int32: sequence i is the rows [i] to [i + 1] of a packed
                                 tensor (total, h, d); None: the tensor is dense, (b, s, h, d)
    seqused_q, seqused_k         (b,) int32: only so many first rows of each sequence count

They live on the device and are never read by the host, unless it is asked to check them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout

_empty: dict[torch.device, Tensor] = {}


class Lengths(NamedTuple):
    """The arguments that give sequences lengths of their own: tensors, or their layouts."""

    cu_seqlens_q: Tensor | Layout | None = None
    cu_seqlens_k: Tensor | Layout | None = None
    seqused_q: Tensor | Layout | None = None
    seqused_k: Tensor | Layout | None = None


NAMES = Lengths._fields
EQUAL = Lengths()  # dense tensors, all rows of which count


@dataclass(frozen=True)
class Sequences:
    """What the host knows of the sequences of a call."""

    batch: int  # how many
    is_ragged: bool  # their lengths are known to the device only
    q_is_packed: bool
    k_is_packed: bool

    @classmethod
    def of(cls, q: Layout, k: Layout, lengths: Lengths) -> "Sequences":
        """Check that all tell the same number of sequences.

        Raises:
            TypeError: a dtype is not int32.
            ValueError: a shape, stride or device is wrong.
        """
        counts = {}
        for name, cu in (("q", lengths.cu_seqlens_q), ("k", lengths.cu_seqlens_k)):
            if cu is not None:
                _check(f"cu_seqlens_{name}", cu, q.device)
                if cu.shape[0] < 1:
                    raise ValueError(f"cu_seqlens_{name} has length 0, expected batch + 1")
                counts[f"cu_seqlens_{name}"] = cu.shape[0] - 1
        for name, layout, cu in (("q", q, lengths.cu_seqlens_q), ("k", k, lengths.cu_seqlens_k)):
            if cu is None:
                counts[name] = layout.shape[0]
        for name, used in (("seqused_q", lengths.seqused_q), ("seqused_k", lengths.seqused_k)):
            if used is not None:
                _check(name, used, q.device)
                counts[name] = used.shape[0]
        (first, batch), *others = counts.items()
        for name, count in others:
            if count != batch:
                raise ValueError(f"{name} has batch {count} but {first} has {batch}")
        packed = lengths.cu_seqlens_q is not None, lengths.cu_seqlens_k is not None
        return cls(batch, lengths != EQUAL, *packed)


def given(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> Lengths:
    """EQUAL itself where there are none."""
    if cu_seqlens_q is None and cu_seqlens_k is None and seqused_q is None and seqused_k is None:
        return EQUAL
    return Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)


def named(lengths: Sequence) -> dict:
    """Those that were given, by the name of the argument."""
    return {name: x for name, x in zip(NAMES, lengths, strict=True) if x is not None}


def views(lengths: Lengths, device: torch.device) -> tuple[Tensor, ...]:
    """As a kernel takes them: one without elements stands for None."""
    nothing = _nothing(device)
    return tuple([nothing if x is None else x for x in lengths])


def check_longest(longest: tuple) -> None:
    """Check max_seqlen_q and max_seqlen_k, where they are numbers and no symbols any more.

    Raises:
        ValueError: one is below 0.
    """
    most_q, most_k = longest
    if (most_q or 0) < 0 or (most_k or 0) < 0:
        side, most = ("q", most_q) if (most_q or 0) < 0 else ("k", most_k)
        raise ValueError(f"max_seqlen_{side} is {most}, expected at least 0")


def check_values(lengths: Lengths, q_rows: int, k_rows: int, longest: tuple, totals: bool) -> None:
    """Wait for the device and see that the tensors have all rows that the lengths say.

    longest: max_seqlen_q and max_seqlen_k, or None where any length is right.
    totals: packed tensors have no other rows.

    Raises:
        ValueError: names the argument, the place, and both values.
    """
    for side, rows, most in (("q", q_rows, longest[0]), ("k", k_rows, longest[1])):
        cu, used = (getattr(lengths, f"{name}_{side}") for name in ("cu_seqlens", "seqused"))
        own = None
        if cu is not None:
            name, given = f"cu_seqlens_{side}", cu.tolist()
            own = [b - a for a, b in zip(given, given[1:], strict=False)]
            _expect(f"{name}[0]", given[0], given[0] == 0, "0")
            for i, length in enumerate(own):
                _expect(f"{name}[{i + 1}]", given[i + 1], length >= 0, f"at least {given[i]}")
            limit = f"{'' if totals else 'at most '}{rows}, the rows of {side}"
            _expect(f"{name}[-1]", given[-1], given[-1] <= rows, limit)
            _expect(f"{name}[-1]", given[-1], given[-1] == rows or not totals, limit)
        if used is not None:
            given = used.tolist()
            for i, length in enumerate(given):
                most_rows = rows if own is None else own[i]
                fits = 0 <= length <= most_rows
                _expect(f"seqused_{side}[{i}]", length, fits, f"0 to {most_rows}")
            own = given
        if most is not None and own:
            name = f"max_seqlen_{side}"
            _expect(name, most, most >= max(own), f"at least {max(own)}, the longest")


def _expect(name: str, given: int, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise ValueError(f"{name} is {given}, expected {wanted}")


def _check(name: str, layout: Layout, device: torch.device) -> None:
    if layout.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {layout.dtype}, expected torch.int32")
    if layout.device != device:
        raise ValueError(f"{name} is on device {layout.device} but q is on {device}")
    if len(layout.shape) != 1:
        raise ValueError(f"{name} has shape {tuple(layout.shape)}, expected one dimension")
    if layout.stride[0] != 1 and layout.shape[0] > 1:
        raise ValueError(f"{name} has stride {layout.stride[0]}, expected 1: it must be contiguous")


def _nothing(device: torch.device) -> Tensor:
    found = _empty.get(device)
    if found is None:
        found = _empty[device] = torch.empty(0, dtype=torch.int32, device=device)
    return found
