"""Lengths: which rows of q, k and v belong to which sequence.

    cu_seqlens_q, cu_seqlens_k   (b + 1,) int32: sequence i is the rows [i] to [i + 1] of a packed
                                 tensor (total, h, d); None: the tensor is dense, (b, s, h, d)
    seqused_q, seqused_k         (b,) int32: only so many first rows of each sequence count
    page_table                   (b, pages) int32: k and v are (num_pages, page_size, h_k, d), and
                                 key j of sequence i is row j % page_size of the page
                                 [i, j // page_size]; entries beyond the last key are not read
    cache_leftpad                (b,) int32, beside page_table: a sequence's first keys, which
                                 seqused_k counts, do not count

They live on the device and are never read by the host, unless it is asked to check them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.signature import PAGE_ROWS
from .layout import Layout

_empty: dict[torch.device, Tensor] = {}


class Lengths(NamedTuple):
    """The arguments that give sequences lengths of their own: tensors, or their layouts."""

    cu_seqlens_q: Tensor | Layout | None = None
    cu_seqlens_k: Tensor | Layout | None = None
    seqused_q: Tensor | Layout | None = None
    seqused_k: Tensor | Layout | None = None
    page_table: Tensor | Layout | None = None
    cache_leftpad: Tensor | Layout | None = None


NAMES = Lengths._fields
EQUAL = Lengths()  # dense tensors, all rows of which count


@dataclass(frozen=True)
class Sequences:
    """What the host knows of the sequences of a call."""

    batch: int  # how many
    is_ragged: bool  # their lengths are known to the device only
    q_is_packed: bool
    k_is_packed: bool
    page_size: int = 0  # keys per page, or 0
    page_rows: int = 0  # so many neighbouring keys surely share a page, as in Signature

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
        if lengths.cu_seqlens_q is None:
            counts["q"] = q.shape[0]
        if lengths.cu_seqlens_k is None:
            counts["k" if lengths.page_table is None else "page_table"] = k.shape[0]
        for name in ("seqused_q", "seqused_k", "cache_leftpad"):
            used = getattr(lengths, name)
            if used is not None:
                _check(name, used, q.device)
                counts[name] = used.shape[0]
        (first, batch), *others = counts.items()
        for name, count in others:
            if count != batch:
                raise ValueError(f"{name} has batch {count} but {first} has {batch}")
        packed = lengths.cu_seqlens_q is not None, lengths.cu_seqlens_k is not None
        return cls(batch, lengths != EQUAL, *packed, *_pages_of(k, lengths))


def _pages_of(k: Layout, lengths: Lengths) -> tuple[int, int]:
    """Sequences.page_size and page_rows; k as in_rows returns it."""
    table = lengths.page_table
    if table is None or table.shape[1] == 0:
        return 0, 0
    size = k.shape[1] // table.shape[1]
    if table.shape[1] == 1:  # no two keys are in different ones
        return size, PAGE_ROWS[-1]
    if lengths.cache_leftpad is not None:  # blocks of keys begin anywhere in a page
        return size, 1
    return size, max(rows for rows in PAGE_ROWS if size % rows == 0)


def in_rows(q: Layout, k: Layout, v: Layout, lengths: Lengths) -> tuple[Layout, Layout]:
    """k and v with shapes (b, s_k, h_k, d), as if the pages of a sequence followed each other.

    Raises:
        TypeError: page_table is not int32.
        ValueError: it or the shapes of the pages are wrong, or cu_seqlens_k is there, too.
    """
    table = lengths.page_table
    if table is None:
        if lengths.cache_leftpad is not None:
            raise ValueError("cache_leftpad is a tensor but page_table is None")
        return k, v
    if lengths.cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k is a tensor beside page_table, expected only one of them")
    _check("page_table", table, q.device, "(batch, pages)")
    for name, layout in (("k", k), ("v", v)):
        if len(layout.shape) != 4:
            raise ValueError(
                f"{name} has {len(layout.shape)} dimensions, {tuple(layout.shape)}, expected 4 "
                "with page_table: (num_pages, page_size, h_k, d)"
            )
    for what, given, wanted in zip(("pages", "keys per page"), v.shape, k.shape, strict=False):
        if given != wanted:
            raise ValueError(f"v has {given} {what} but k has {wanted}")
    page_size = k.shape[1]
    if page_size <= 0:
        raise ValueError(f"k has {page_size} keys per page, expected at least 1")
    batch, pages = table.shape
    if lengths.cu_seqlens_q is None and len(q.shape) == 4 and q.shape[0] != batch:
        raise ValueError(f"page_table has batch {batch} but q has {q.shape[0]}")
    return tuple(x._replace(shape=(batch, pages * page_size, *x.shape[2:])) for x in (k, v))


def given(*lengths: Tensor | None) -> Lengths:
    """The fields of Lengths; EQUAL itself where there are none."""
    return EQUAL if all(x is None for x in lengths) else Lengths(*lengths)


def named(lengths: Sequence) -> dict:
    """Those that were given, by the name of the argument."""
    return {name: x for name, x in zip(NAMES, lengths, strict=True) if x is not None}


def views(lengths: Lengths, device: torch.device) -> tuple[Tensor | None, ...]:
    """As a kernel takes them: the page table may be None."""
    return *or_empty(lengths[:4], device), lengths.page_table


def leftpad(lengths: Lengths, device: torch.device) -> Tensor | None:
    """As a kernel takes it, which has one if keys are in pages."""
    return None if lengths.page_table is None else or_empty((lengths.cache_leftpad,), device)[0]


def or_empty(numbers: Sequence, device: torch.device) -> list[Tensor]:
    """Tensors, of which one without elements stands for None."""
    nothing = _nothing(device)
    return [nothing if x is None else x for x in numbers]


def check_longest(longest: tuple) -> None:
    """Check max_seqlen_q and max_seqlen_k, where they are numbers and no symbols any more.

    Raises:
        ValueError: one is below 0.
    """
    most_q, most_k = longest
    if (most_q or 0) < 0 or (most_k or 0) < 0:
        side, most = ("q", most_q) if (most_q or 0) < 0 else ("k", most_k)
        raise ValueError(f"max_seqlen_{side} is {most}, expected at least 0")


def check_values(
    lengths: Lengths, q_rows: int, k_shape: Sequence[int], longest: tuple, totals: bool
) -> None:
    """Wait for the device and see that the tensors have all rows that the lengths say.

    longest: max_seqlen_q and max_seqlen_k, or None where any length is right.
    totals: packed tensors have no other rows.

    Raises:
        ValueError: names the argument, the place, and both values.
    """
    k_rows = k_shape[-3]
    if lengths.page_table is not None:
        k_rows *= lengths.page_table.shape[1]
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
    if lengths.page_table is not None:
        _check_leftpad(lengths, k_rows)
        _check_pages(lengths, *k_shape[:2])


def _check_leftpad(lengths: Lengths, k_rows: int) -> None:
    given, used = lengths.cache_leftpad, lengths.seqused_k
    if given is None:
        return
    ends = [k_rows] * given.shape[0] if used is None else used.tolist()
    for i, (rows, end) in enumerate(zip(given.tolist(), ends, strict=True)):
        _expect(f"cache_leftpad[{i}]", rows, 0 <= rows <= end, f"0 to {end}, the length")


def _check_pages(lengths: Lengths, num_pages: int, page_size: int) -> None:
    """Of all entries of the table that keys are looked up in."""
    table, used = lengths.page_table, lengths.seqused_k
    if used is None:
        used = table.new_full((1,), table.shape[1] * page_size)
    place = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
    is_wrong = (place * page_size < used[:, None]) & ((table < 0) | (table >= num_pages))
    for i, j in is_wrong.nonzero().tolist():
        _expect(f"page_table[{i}, {j}]", table[i, j].item(), False, f"0 to {num_pages - 1}")


def _expect(name: str, given: int, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise ValueError(f"{name} is {given}, expected {wanted}")


def _check(name: str, layout: Layout, device: torch.device, shape: str = "one dimension") -> None:
    if layout.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {layout.dtype}, expected torch.int32")
    if layout.device != device:
        raise ValueError(f"{name} is on device {layout.device} but q is on {device}")
    if len(layout.shape) != 1 + shape.count(","):
        raise ValueError(f"{name} has shape {tuple(layout.shape)}, expected {shape}")
    if layout.stride[-1] != 1 and layout.shape[-1] > 1:
        raise ValueError(f"{name} has stride {layout.stride[-1]} in its last dimension, expected 1")


def _nothing(device: torch.device) -> Tensor:
    found = _empty.get(device)
    if found is None:
        found = _empty[device] = torch.empty(0, dtype=torch.int32, device=device)
    return found
