"""Which rows of q, k and v count: padded batches, free space of static caches, packed sequences.

All of it is found once per forward, by the mask function, and used by every layer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .transformers_models import refusal, remedy

BROKEN = "has no sliding windows over sequences with masked tokens between others"


@dataclass(frozen=True, eq=False)
class Rows:
    """Of each sequence of a dense tensor (b, s, h, d) some rows count, the others are padding."""

    lengths: Tensor  # (b,) int32: how many
    order: Tensor | None = None  # (b, s): where those that count are, then the others
    places: Tensor | None = None  # the inverse; both are None where those that count come first

    def gather(self, x: Tensor) -> Tensor:
        """x (b, s, h, d) with the rows that count before the others."""
        return x if self.order is None else _take(x, self.order)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of gather."""
        return x if self.places is None else _take(x, self.places)


class Packed(NamedTuple):
    """Sequences one after another in the rows of all batch entries, as flash_attn_varlen_func's."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, sequence: Tensor) -> "Packed":
        """sequence (b, s): equal neighbours in an entry belong together. Waits for the device."""
        b, s = sequence.shape
        is_first = torch.ones((b, s), dtype=torch.bool, device=sequence.device)
        is_first[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
        ends = torch.nn.functional.pad(is_first.flatten(), (0, 1), value=True)
        cu_seqlens = ends.nonzero().flatten().to(torch.int32)
        return cls(cu_seqlens, cu_seqlens, s, s)


class Place(NamedTuple):
    """The positions of queries and keys."""

    q_offset: int | Tensor  # a tensor where only the device knows how full a static cache is
    q_length: int
    kv_offset: int
    kv_length: int

    @property
    def is_open(self) -> bool:
        return isinstance(self.q_offset, Tensor)

    @property
    def surplus(self) -> int:
        """Keys behind the last query; 0 where they are not known."""
        if self.is_open:
            return 0
        return self.kv_offset + self.kv_length - (self.q_offset + self.q_length)


class Counted(NamedTuple):
    """The rows that count, or None where all do."""

    queries: Rows | None = None
    keys: Rows | None = None


def free_space(place: Place, batch: int) -> Counted:
    """Of a batch without padding."""
    if not place.is_open:
        return Counted()
    filled = (place.q_offset + place.q_length - place.kv_offset).to(torch.int32)
    return Counted(keys=Rows(filled.reshape(1).repeat(batch)))


def padding(model, place: Place, attention_mask: Tensor, causal: bool, is_local: bool) -> Counted:
    """Of a batch with an attention_mask (b, tokens).

    Only a causal mask tells which tokens the queries are. is_local: there is a sliding window.

    Raises:
        ValueError: attention_mask has another shape.
        NotImplementedError: masked tokens between others, with a sliding window.
    """
    keys = real_keys(model, place, attention_mask)
    key_rows = _rows(keys)
    if key_rows is None:
        return Counted()
    if is_local:
        _check_unbroken(model, keys)
    if not causal:
        return Counted(None, key_rows)
    q_offset, q_length, *of_keys = place
    if place.is_open:
        column = torch.arange(q_length, dtype=torch.int64, device=keys.device) + (
            q_offset - place.kv_offset
        )
        return Counted(_rows(keys.index_select(1, column)), key_rows)
    if [q_offset, q_length] == of_keys:
        return Counted(key_rows, key_rows)
    return Counted(_rows(attention_mask[:, q_offset : q_offset + q_length].bool()), key_rows)


def real_keys(model, place: Place, attention_mask: Tensor) -> Tensor:
    """(b, kv_length): which keys are of real tokens. A static cache is longer than the mask."""
    stop = place.kv_offset + place.kv_length
    missing = stop - attention_mask.shape[1] if attention_mask.ndim == 2 else stop
    if attention_mask.ndim != 2 or (missing > 0 and not place.is_open):
        raise ValueError(
            f"{model}: attention_mask has shape {tuple(attention_mask.shape)}, expected "
            f"(batch, tokens) with at least {stop} tokens"
        )
    is_real = attention_mask.bool()
    if not place.is_open:
        return is_real[:, place.kv_offset : stop]
    is_real = torch.nn.functional.pad(is_real, (0, max(0, missing)))[:, place.kv_offset : stop]
    position = torch.arange(place.kv_offset, stop, dtype=torch.int64, device=is_real.device)
    return is_real & (position < place.q_offset + place.q_length)


def _rows(is_real: Tensor) -> Rows | None:
    """Rows of is_real (b, s), true where a row counts; None if all do.

    What can be read is: then a batch without padding costs nothing more, and one that is padded on
    the right no copies.
    """
    can_be_read = is_readable(is_real)
    if can_be_read and is_real.all():
        return None
    lengths = is_real.sum(1, dtype=torch.int32)
    row = torch.arange(is_real.shape[1], dtype=torch.int64, device=is_real.device).expand(
        is_real.shape
    )
    if can_be_read and not (is_real & (row >= lengths[:, None])).any():
        return Rows(lengths)
    rank = is_real.cumsum(1)  # from 1
    places = torch.where(is_real, rank - 1, lengths[:, None] + row - rank)
    order = torch.zeros_like(places).scatter(1, places, row)
    return Rows(lengths, order, places)


def _check_unbroken(model, is_real: Tensor) -> None:
    """A window is counted in tokens of the sequence, masked ones between them included."""
    if torch.jit.is_tracing():
        reason = "cannot check the padding of sliding windows in what torch.jit.trace records"
        raise refusal(model, reason, besides="torch.export, no attention_mask, or ")
    starts = is_real[:, 1:] & ~is_real[:, :-1]
    is_unbroken = (starts.sum(1) + is_real[:, 0] <= 1).all()
    if not is_readable(is_unbroken):
        assert_on_device(is_unbroken, model, f"fa3 {BROKEN}; {remedy()}")
    elif not is_unbroken:
        raise refusal(model, BROKEN)


def assert_on_device(condition: Tensor, model: str, text: str) -> None:
    # inductor pastes the text into C++ as it is
    torch._assert_async(condition, f"{model}: {text}".replace('"', "'"))


def is_readable(x: Tensor) -> bool:
    """Its values may be read, if need be by waiting for a device: nobody records what is done."""
    if type(x) is not Tensor or x.device.type == "meta":
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch.jit.is_tracing():
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _take(x: Tensor, order: Tensor) -> Tensor:
    order = order.to(x.device)
    entry = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)[:, None]
    return x[entry, order]
