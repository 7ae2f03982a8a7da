"""Scales: what the descales of one-byte inputs are, and the shift of v.

    value = byte * descale        v: value = byte * descale + shift

    q_descale   (b, h_k) per batch and key head   (b, h_q, ceil(s_q / 128)) per 128 queries
    k_descale   (b, h_k)                          (b, h_k, ceil(s_k / B))   per B keys, 64 or 128
    v_descale   (b, h_k)                          (b, h_k, ceil(s_k / B))   per B keys, 64 or 128
                                                  (b, h_k, 1, dv)           per channel
    v_shift     (b, h_k, dv)

Of packed tensors (total, h, d) a descale per block of rows has a dimension of 1 for the batch, and
no two sequences share a block:

    q_descale   (1, h_q, total_q // 128 + b)      [0, h, cu_seqlens_q[i] // 128 + i + row // 128]
    k_descale   (1, h_k, total_k // B + b)        [0, h, cu_seqlens_k[i] // B + i + row // B]

The kernel takes each descale as (b, heads, n) in fp32 with any strides: a dimension that a form
lacks has stride 0, and None is a one that is read for all of them. Rank and length tell the forms
apart. It reads v_shift by 16 bytes, which may cost a copy; None is a row of zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels.signature import HEAD_DIM_TILES, Q_BLOCK
from .layout import ALIGNMENT, Layout
from .lengths import Sequences

K_BLOCKS = (128, 64)  # keys per scale; the first where both make one block
BYTES = 4  # of a descale, which may start at any multiple of them

_constants: dict[tuple[torch.device, float], torch.Tensor] = {}


class Descales(NamedTuple):
    """The arguments that scale one-byte inputs: tensors, or their layouts."""

    q_descale: torch.Tensor | Layout | None = None
    k_descale: torch.Tensor | Layout | None = None
    v_descale: torch.Tensor | Layout | None = None
    v_shift: torch.Tensor | Layout | None = None


NAMES = Descales._fields
NO_DESCALES = Descales()


class Form(NamedTuple):
    """One way to lay out the scales of a tensor."""

    what: str
    shape: tuple[int, ...]
    width: int  # last dimension of what the kernel takes
    block: int = 0  # rows per scale; 0: all rows of a head have the same


@dataclass(frozen=True)
class ScaleView:
    """How the kernel is given one descale."""

    block: int  # rows per scale; 0: all rows of a head have the same
    shape: tuple[int, int, int]  # (b, heads, n)
    stride: tuple[int, int, int]
    as_given: bool  # no view is needed

    @classmethod
    def of(cls, form: Form, layout: Layout | None) -> "ScaleView":
        shape = (*form.shape[:2], form.width)
        if layout is None:
            return cls(form.block, shape, (0, 0, 0), False)
        last = 0 if len(form.shape) == 2 else layout.stride[-1]
        return cls(form.block, shape, (*layout.stride[:2], last), len(form.shape) == 3)

    def __call__(self, descale: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if self.as_given:
            return descale
        descale = _constant(1.0, device) if descale is None else descale
        return descale.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class ShiftView:
    """How the kernel is given v_shift: channels side by side, every row aligned to 16 bytes."""

    shape: tuple[int, int, int]  # (b, h_k, dv)
    as_given: bool  # if it starts at a multiple of 16 bytes

    @classmethod
    def of(cls, shape: tuple[int, int, int], layout: Layout | None) -> "ShiftView":
        if layout is None:
            return cls(shape, False)
        *steps, last = layout.stride
        return cls(shape, last == 1 and not any(step * BYTES % ALIGNMENT for step in steps))

    def __call__(self, shift: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if shift is None:
            return _constant(0.0, device).as_strided(self.shape, (0, 0, 1))
        if self.as_given and not shift.data_ptr() % ALIGNMENT:
            return shift
        return shift.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Scales:
    """The three descales of one call, and the shift."""

    q: ScaleView
    k: ScaleView
    v: ScaleView
    v_shift: ShiftView

    @classmethod
    def of(cls, q: Layout, v: Layout, descales: Descales, sequences: Sequences) -> "Scales":
        """Check them against q (.., s_q, h_q, d) and v (.., s_k, h_k, dv).

        Raises:
            TypeError: a dtype is not float32.
            ValueError: a shape has none of the forms, or a device is not that of q.
        """
        forms = forms_of(q.shape, v.shape, sequences)
        found = {
            name: _form_of(name, layout, forms[name], q.device)
            for name, layout in zip(NAMES, descales, strict=True)
        }
        *scales, shift = found.values()
        return cls(
            *(ScaleView.of(*pair) for pair in zip(scales, descales[:3], strict=True)),
            ShiftView.of(shift.shape, descales.v_shift),
        )

    def views(self, device, q_descale, k_descale, v_descale, v_shift=None) -> tuple:
        """(b, h_q or h_k, n), (b, h_k, n), (b, h_k, n) per block, else (b, h_k, dv); shift."""
        return (
            self.q(q_descale, device),
            self.k(k_descale, device),
            self.v(v_descale, device),
            self.v_shift(v_shift, device),
        )


@dataclass(frozen=True)
class CacheScales:
    """Of one-byte k and v beside 16-bit q: (b, h_k) each."""

    shape: tuple[int, int]

    @classmethod
    def of(cls, q: Layout, k: Layout, descales: Descales, batch: int) -> "CacheScales":
        """Check them against q (.., s_q, h_q, d) and k (.., s_k, h_k, d).

        Raises:
            TypeError: a dtype is not float32.
            ValueError: a shape is not (b, h_k), or one is there of what has no scale.
        """
        shape = batch, k.shape[-2]
        for name, layout in named(descales).items():
            if name not in ("k_descale", "v_descale"):
                raise ValueError(
                    f"{name} is a tensor but q has dtype {q.dtype}, expected None: beside 16-bit q "
                    "only k and v have scales"
                )
            _form_of(name, layout, [Form("(batch, h_k)", shape, 1)], q.device)
        return cls(shape)

    def views(self, device, q_descale, k_descale, v_descale, v_shift=None) -> tuple:
        """As Scales.views: nothing for q, (b, h_k) of k and v, no shift."""
        k, v = (
            _constant(1.0, device).as_strided(self.shape, (0, 0)) if x is None else x
            for x in (k_descale, v_descale)
        )
        return None, k, v, None


def forms_of(
    q_shape: Sequence[int], v_shape: Sequence[int], sequences: Sequences
) -> dict[str, list[Form]]:
    """The forms that each argument may have; the first also stands for None."""
    s_q, h_q, _ = q_shape[-3:]
    s_k, h_k, head_dim_v = v_shape[-3:]
    batch = sequences.batch

    def per_head(width: int) -> Form:
        return Form("(batch, h_k)", (batch, h_k), width)

    def per_block(rows: str, length: int, heads: int, block: int, is_packed: bool) -> Form:
        entries, count = batch, num_blocks(length, block)
        if is_packed:
            entries, count = 1, packed_blocks(length, block, batch)
        return Form(f"per {block} {rows}", (entries, heads, count), count, block)

    keys = [per_block("keys", s_k, h_k, block, sequences.k_is_packed) for block in K_BLOCKS]
    channels = Form("per channel", (batch, h_k, 1, head_dim_v), head_dim_v)
    shift = Form("(batch, h_k, dv)", (batch, h_k, head_dim_v), head_dim_v)
    return {
        "q_descale": [per_head(1), per_block("queries", s_q, h_q, Q_BLOCK, sequences.q_is_packed)],
        "k_descale": [per_head(1), *keys],
        "v_descale": [per_head(head_dim_v), *keys, channels],
        "v_shift": [shift],
    }


def named(descales: Sequence) -> dict:
    """Those of the descales and the shift that were given, by the name of the argument."""
    return {name: x for name, x in zip(NAMES, descales, strict=True) if x is not None}


def num_blocks(length: int, block: int) -> int:
    return -(-length // block)


def packed_blocks(total: int, block: int, batch: int) -> int:
    """Blocks of all sequences: the first of sequence i is cu_seqlens[i] // block + i."""
    return total // block + batch


def check_values(**descales: torch.Tensor) -> None:
    """Wait for the device and see that all are finite, and descales above zero."""
    given = {name: x for name, x in descales.items() if not x.is_meta}
    wrong = {
        name: ~x.isfinite() if name == "v_shift" else ~(x > 0) | x.isinf()
        for name, x in given.items()
    }
    if not wrong or not torch.stack([x.any() for x in wrong.values()]).any():
        return
    for name, x in wrong.items():
        places = x.nonzero()
        if len(places):
            index = tuple(places[0].tolist())
            value = given[name][index].item()
            above = "" if name == "v_shift" else " above 0"
            raise ValueError(f"{name} is {value} at {index}, expected a finite number{above}")


def _form_of(name: str, layout: Layout | None, forms: list[Form], device: torch.device) -> Form:
    if layout is None:
        return forms[0]
    if layout.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {layout.dtype}, expected torch.float32")
    if layout.device != device:
        raise ValueError(f"{name} is on device {layout.device} but q is on {device}")
    for form in forms:
        if tuple(layout.shape) == form.shape:
            return form
    wanted = " or ".join(f"{form.shape} ({form.what})" for form in forms)
    raise ValueError(f"{name} has shape {tuple(layout.shape)}, expected {wanted}")


def _constant(value: float, device: torch.device) -> torch.Tensor:
    """As many as any head has channels, kept per device.

    The copy from the host is over before any stream reads it.
    """
    if (device, value) in _constants:
        return _constants[device, value]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _full(value, device)  # of the graph, whose replay writes it
    return _constants.setdefault((device, value), _full(value, torch.device("cpu")).to(device))


def _full(value: float, device: torch.device) -> torch.Tensor:
    return torch.full(HEAD_DIM_TILES[-1:], value, dtype=torch.float32, device=device)
