"""What each query may see, from the mask functions of transformers to the attention of a layer.

transformers asks a mask function once per forward, and hands what it returns to every layer. A
mask of numbers would take s_q * s_k bytes; None would be lost on a layer with an attention of its
own, whose tokens would see the future. `mask` returns a `Pattern`, which only fa3's attention can
read: every other use of it raises an error that says so.
"""

from dataclasses import dataclass, replace
from types import FunctionType
from typing import NamedTuple

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .transformers_models import model_type, refusal, remedy
from .transformers_rows import (
    Packed,
    Place,
    Rows,
    assert_on_device,
    free_space,
    is_readable,
    padding,
    real_keys,
)

UNBOUNDED = (-1, -1)
COMBINATORS = ("and_masks", "or_masks", "remap_positions_for_packed_sequence")
PACKED = (
    "fa3 finds no packed sequences while it is traced, and has no mask for blocks of tokens: "
    'use attn_implementation="sdpa"'
)


class NoAttribute(NotImplementedError, AttributeError):
    """The refusal that leaves hasattr() False."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """The keys that the queries of one call see.

    The last query stands at the last visible key. window: as in flash_attn_func.
    query_rows, key_rows: which rows count, where not all do. A mask that is not causal may be for
    the queries of other tokens, so query_rows is of causal ones only.
    """

    model: str
    queries: int
    keys: int  # that the call brings
    visible: int  # the first of them, which any query may see; a static cache has free space behind
    causal: bool
    window: tuple[int, int] = UNBOUNDED
    query_rows: Rows | None = None
    key_rows: Rows | None = None
    packed: Packed | None = None
    batch: int | None = None  # that the rows or the packed sequences are of

    ndim = 4  # as of the masks that transformers passes on as they are

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 1, self.queries, self.keys

    @property
    def facts(self) -> tuple:
        return self.queries, self.keys, self.visible, self.causal, self.window

    def check_lengths(self, queries: int, keys: int, batch: int) -> None:
        """Raise ValueError unless the call is as large as the mask function was told."""
        if self.batch not in (None, batch):
            raise ValueError(
                f"{self.model}: attention of a batch of {batch} got the padding or packing of a "
                f"batch of {self.batch}; {remedy()}"
            )
        is_full = not self.causal and self.window == UNBOUNDED  # the same for any queries
        if keys != self.keys or (queries != self.queries and not is_full):
            raise ValueError(
                f"{self.model}: attention of {queries} queries to {keys} keys got a mask for "
                f"{self.queries} queries and {self.keys} keys; {remedy()}"
            )

    def _foreign(self):
        return refusal(
            self.model,
            "cannot give a mask to a layer that computes attention without transformers' "
            "attention interface",
        )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = _first_pattern(args) or _first_pattern((kwargs or {}).values())
        raise found._foreign()

    def __getitem__(self, index):
        raise self._foreign()

    def _refuse(self, *others):
        raise self._foreign()

    __bool__ = __len__ = __float__ = __int__ = __array__ = _refuse
    __neg__ = __invert__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __and__ = __rand__ = __or__ = __ror__ = _refuse

    def __getattr__(self, name):
        if name.startswith("_") or name in self.__dataclass_fields__:
            raise AttributeError(name)
        raise NoAttribute(str(self._foreign()))


def _first_pattern(values) -> Pattern | None:
    for value in values:
        if isinstance(value, Pattern):
            return value
        if isinstance(value, (tuple, list)) and (found := _first_pattern(value)):
            return found
    return None


def mask(
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    config=None,
    **options,
) -> Pattern:
    """What the queries q_offset + i see of the keys kv_offset + j, for i, j below the lengths.

    attention_mask (b, tokens): true where a token is real. q_offset: of a static cache a tensor.
    options: what else `transformers.masking_utils` tells a mask function.

    A batch with an attention_mask waits for its device here, to learn whether it is padded. While
    somebody records what is done (torch.compile, a CUDA graph) nothing waits or branches on data,
    and what only the data tells is asserted on its device: a RuntimeError, on a GPU a failed device
    assertion, whose text says what was wrong.

    Raises:
        ValueError: an attention_mask of another shape.
        NotImplementedError: a pattern other than full, causal, sliding window and packed sequences;
            masked tokens between others under a sliding window.
    """
    model = model_type(config)
    made = attention_mask if isinstance(attention_mask, Pattern) else None  # `generate` did already
    kind = _kind_of(model, mask_function, config, q_length, kv_offset + kv_length, options)
    place = Place(q_offset if kind.is_placed else 0, q_length, kv_offset, kv_length)
    surplus = place.surplus
    free = max(surplus, 0) if kind.causal else 0  # the free space of a static cache
    visible = kv_length - free
    window = kind.window(max(visible, q_length))
    if surplus != free and (kind.causal or window != UNBOUNDED):
        raise refusal(
            model,
            "aligns the last query with the last key, here at positions "
            f"{q_offset + q_length - 1} and {kv_offset + kv_length - 1}",
        )
    place = place._replace(kv_length=visible)
    if not kind.is_known:
        is_real = None if made is not None else attention_mask
        _assert_kind(model, kind, mask_function, place, is_real, options)
    pattern = Pattern(model, q_length, kv_length, visible, kind.causal, window)
    if made is not None:
        if made.facts != pattern.facts:
            raise refusal(model, f"was given the mask of another pattern, {made} for {pattern}")
        return made
    is_local = window != UNBOUNDED
    if attention_mask is not None:
        rows = padding(model, place, attention_mask, kind.causal, is_local)
    else:
        rows = free_space(place, options.get("batch_size", 1))
    if rows.keys is not None:
        batch = rows.keys.lengths.shape[0]
        return replace(pattern, query_rows=rows.queries, key_rows=rows.keys, batch=batch)
    if kind.sequence is not None:
        batch = kind.sequence.shape[0]
        return replace(pattern, packed=Packed.of(kind.sequence), batch=batch)
    return pattern


class Kind(NamedTuple):
    """A pattern without its lengths."""

    causal: bool
    reach: int | None = None  # distance of the farthest key that a query sees
    is_known: bool = True  # otherwise the device has to compare
    sequence: torch.Tensor | None = None  # (b, s): to which packed sequence a token belongs

    @property
    def is_placed(self) -> bool:
        """Which keys a query sees depends on its position."""
        return self.causal or self.reach is not None

    def window(self, length: int) -> tuple[int, int]:
        if self.reach is None:
            return UNBOUNDED
        if self.reach >= length - 1 and not torch.jit.is_tracing():  # which would fix the answer
            return UNBOUNDED
        return self.reach, -1 if self.causal else self.reach


def _kind_of(model, mask_function, config, q_length, kv_end, options) -> Kind:
    """What transformers says without a look at the data, or the refusal of the pattern.

    It passes closures, which torch.compile cannot look into, and flags: the skip of a mask is
    allowed where nothing is laid over the plain pattern.
    """
    if mask_function is causal_mask_function:
        return Kind(causal=True)
    if mask_function is bidirectional_mask_function:
        return Kind(causal=False)
    size = options.get("local_size")
    if options.get("allow_is_bidirectional_skip"):
        return Kind(causal=False, reach=size)
    if size is not None and size == getattr(config, "attention_chunk_size", None):
        if kv_end > size:
            raise refusal(model, f"has no chunked attention, here of {kv_end} keys by {size}")
        size = None
    reach = None if size is None else size - 1
    if options.get("allow_is_causal_skip"):
        return Kind(True, reach)
    # transformers looks for packed sequences in the data, unless it is traced; and it never allows
    # the skip to one query of a static cache
    is_open = torch.compiler.is_compiling() or q_length == 1
    if is_open and not options.get("use_vmap"):
        return Kind(True, reach, is_known=False)
    if not is_open and not options.get("use_vmap"):
        sequence = _sequence_of(mask_function, reach)
        if sequence is not None and is_readable(sequence):
            return Kind(True, reach, sequence=sequence)
    raise refusal(
        model,
        "knows full and causal attention and sliding windows, not the mask of "
        f"{_describe(mask_function)}",
    )


def _assert_kind(model, kind, mask_function, place, attention_mask, options) -> None:  # noqa: PLR0913
    """Compare the model's mask with the plain one, element by element, on its device."""
    device = options.get("device")
    q, kv = (
        torch.arange(n, dtype=torch.int64, device=device) + start
        for n, start in (
            (place.q_length, place.q_offset),
            (place.kv_length, place.kv_offset),
        )
    )
    q, kv = q[None, None, :, None], kv[None, None, None, :]
    batch = torch.arange(options["batch_size"], dtype=torch.int64, device=device)[
        :, None, None, None
    ]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    expected = kv <= q
    if kind.reach is not None:
        expected = expected & (kv >= q - kind.reach)
    same = mask_function(batch, head, q, kv) == expected
    if attention_mask is not None:  # a chunk starts behind the padding
        same = same | ~real_keys(model, place, attention_mask)[:, None, None]
    assert_on_device(same.all(), model, PACKED)


def _functions_in(mask_function) -> list[FunctionType]:
    """The functions that a mask function is made of, but for the plain ones."""
    found, waiting = [], [mask_function]
    while waiting:
        function = waiting.pop(0)
        if function not in (causal_mask_function, bidirectional_mask_function):
            found.append(function)
        for cell in function.__closure__ or ():
            held = cell.cell_contents
            held = held if isinstance(held, (tuple, list)) else [held]
            waiting += [x for x in held if isinstance(x, FunctionType)]
    return found


def _name(function) -> str:
    return function.__qualname__.split(".<locals>")[0]


def _overlays(mask_function) -> dict[str, FunctionType]:
    """What is laid over the plain pattern, by name."""
    found = {_name(function): function for function in _functions_in(mask_function)}
    return {name: function for name, function in found.items() if name not in COMBINATORS}


def _sequence_of(mask_function, reach) -> torch.Tensor | None:
    """(b, s): which sequence a token is of, where nothing but packing is laid over the rest."""
    overlays = _overlays(mask_function)
    packing = overlays.pop("packed_sequence_mask_function", None)
    rest = set() if reach is None else {"sliding_window_overlay"}
    if packing is None or set(overlays) != rest:
        return None
    held = dict(zip(packing.__code__.co_freevars, packing.__closure__, strict=True))
    cell = held.get("packed_sequence_mask")
    return None if cell is None else cell.cell_contents


def _describe(mask_function) -> str:
    if torch.compiler.is_compiling():  # which cannot look into closures
        return "this model"
    return ", ".join(_overlays(mask_function)) or "this model"
