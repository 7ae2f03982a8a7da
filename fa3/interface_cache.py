"""Attention with a cache of keys and values, as programs that generate text call it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import append, ops
from .attend import (
    are_plain,
    attend,
    bounds_of,
    check_no_grad,
    check_out,
    check_unused,
    descales_of,
    options_of,
    splits_of,
)
from .call import hints, lengths
from .call.layout import Layout, check_like, check_tensors
from .call.lengths import Lengths
from .call.listed import splits_with
from .call.options import bool_of, int_of
from .call.problem import BYTE_DTYPES, DTYPES, OUT_DTYPES, WIDENED_DTYPES
from .call.scales import Descales

ROTARY_UNIT = 16  # columns that are rotated come in multiples of it
PACKED_QUERIES = 64  # of a sequence, at most, if pack_gqa does not say: half of a tile


@hints.closed
def flash_attn_with_kvcache(  # noqa: PLR0913 - the signature is FA3's
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
    *,
    out=None,
    learnable_sink=None,
    check_pages=False,
    **unknown,
):
    """Attention of a few new queries to the keys and values of a cache.

    q (batch, s_q, h_q, d), or (total_q, h_q, d) with cu_seqlens_q (batch + 1,) and max_seqlen_q.
    k_cache (batch_cache, s_k, h_k, d), v_cache (batch_cache, s_k, h_k, dv), or pages, (num_pages,
        page_size, h_k, d) and (.., dv), with page_table.
    cache_seqlens: (batch,) int32, or an int for all: how many rows of its cache each sequence has;
        without it all rows count.
    page_table: (batch, pages) int32; row j of sequence i is row j % page_size of the page
        page_table[i, j // page_size]. Entries beyond the last row may be anything, -1 too. Pages of
        a multiple of 8 rows, better of 64 or more, are loaded faster than others.
    cache_leftpad: (batch,) int32, how many of its first rows, which cache_seqlens counts, each
        sequence does not see; positions are counted from the first row all the same.
    cache_batch_idx: (batch,) int32, which entry of the cache, or row of page_table, a sequence has;
        without it its own.

    k (batch, s_new, h_k, d), v (batch, s_new, h_k, dv), or packed (total_new, h_k, d) with
        cu_seqlens_k_new (batch + 1,): are written to the cache first, from row cache_seqlens[i]
        on, and attended to with the others. What does not fit is dropped. They have the dtype of
        the cache, or 16 bits beside one in torch.float8_e4m3fn (q's dtype, if that has 16): what is
        stored are the codes nearest to k / k_descale and v / v_descale, (batch, h_k) each.
    rotary_cos, rotary_sin: (positions, n / 2), of q's dtype, n a multiple of 16 up to d: the first
        n columns of q and k are rotated, k before it is written. Beside e4m3 they may have 16 bits
        or be fp32, which costs less of the accuracy. Row j of k has the position
        cache_seqlens[i] + j. So has row j of q with causal or a window; else all have that of 0.
    rotary_seqlens: (batch,) int32, instead of cache_seqlens in these positions.
    rotary_interleaved: columns 2 i and 2 i + 1 turn together; else i and i + n / 2.

    pack_gqa: True puts the query heads of a key head under one another in the rows of a tile, so
        that K and V are loaded once for all, False keeps them apart; neither changes a result. By
        default they share where no sequence has more than 64 queries. Beside a sink, or with scales
        per block of queries, they never do. q and out are copied for it, but for one query or one
        key head.
    check_pages: wait for the device and refuse cache_seqlens and page_table that do not fit the
        cache. On CPU tensors all is checked anyway. Elsewhere lengths are cut to what the cache
        has, and pages that do not exist hold zeros.
    q_descale, k_descale, v_descale, softmax_scale, causal, window_size, softcap, sm_margin, out,
        learnable_sink: as in flash_attn_func, as is which dtypes go together; causal is aligned to
        the bottom right of each sequence.
    num_splits: as in flash_attn_func, but chosen by default, by the rows that a cache may have.
    scheduler_metadata: of fa3.get_scheduler_metadata for the same arguments: the order of the work,
        made once for all layers of a step. It saves a launch per call and changes no bit. It may be
        made of other cache_seqlens, at some cost of speed, but not of other cu_seqlens_q or
        max_seqlen_q. No two streams may use one at once.

    Returns out, like q but with v_cache's head dim, or with return_softmax_lse=True the pair out
    and lse (batch, h_q, s_q), of packed q (h_q, total_q).

    There is no backward pass: tensors that require grad are refused where gradients are recorded.

    Raises: as flash_attn_func; caches are written only when all else has been checked.
    """
    if unknown:
        raise hints.unknown_argument(flash_attn_with_kvcache, next(iter(unknown)))
    check_unused(qv, attention_chunk, pack_gqa)
    num_splits = splits_with(scheduler_metadata, splits_of(num_splits))
    return_softmax_lse = bool_of("return_softmax_lse", return_softmax_lse)
    check_pages = bool_of("check_pages", check_pages)
    options = options_of(softmax_scale, causal, window_size, sm_margin, softcap)
    descales = descales_of(q_descale, k_descale, v_descale, None)
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    where = page_table, cache_batch_idx, cache_leftpad
    cache = _Cache.of(q, k_cache, v_cache, batch, cache_seqlens, *where)
    new = _New.of(cache, q, k, v, cu_seqlens_k_new)
    check_no_grad(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    rotary = _Rotary.of(q, cache, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    given = cache.lengths(cu_seqlens_q, new)
    longest, check = bounds_of(given, max_seqlen_q, None, check_pages)
    if out is not None:
        check_out(out)
    plain = are_plain(q, k_cache, v_cache, out, given)
    if plain and (check or q.device.type == "cpu"):
        cache.check_room(0 if new is None else new.counts)
    heads = _Heads.of(q, k_cache, longest[0], q_descale, learnable_sink, pack_gqa)
    packed_options = heads.options(options)
    out, target = heads.targets(q, v_cache, out)
    given, longest = heads.lengths(given), (heads.rows(longest[0]), None)
    if plain:
        more = packed_options, descales, given, longest, check, learnable_sink, num_splits
        ops.prepare(heads.pack(q), k_cache, v_cache, target, *more, scheduler_metadata)
    if new is not None:
        new.append(cache, rotary, descales)
    if rotary is not None:
        q = rotary.rotate(q, cu_seqlens_q, options)
    inputs = heads.pack(q), k_cache, v_cache, target
    more = None, False, given, longest, check, learnable_sink
    last = {"num_splits": num_splits, "metadata": scheduler_metadata}
    result, lse = attend(*inputs, packed_options, descales, *more, **last)
    if out is None:
        out = heads.unpack(result)
    elif target is None:
        out.copy_(heads.unpack(result))
    return (out, heads.unpack_lse(lse)) if return_softmax_lse else out


@dataclass(frozen=True)
class _Heads:
    """Which query heads are rows of one tile: those of a key head, or none.

    Few queries leave most of a tile empty.  Put under one another, the heads of a group fill it,
    and what they attend to is loaded once for all.
    """

    group: int  # 1: each head has tiles of its own
    h_k: int
    has_views: bool  # with one query there is a view of q and out that has its heads as rows

    @classmethod
    def of(cls, q, k_cache, longest, q_descale, sink, pack_gqa) -> "_Heads":  # noqa: PLR0913
        if pack_gqa is None:
            pack_gqa = (q.shape[1] if longest is None else longest) <= PACKED_QUERIES
        wants = bool_of("pack_gqa", pack_gqa)
        h_q, h_k = q.shape[-2], k_cache.shape[-2]
        has_group = h_k > 0 and h_q > h_k and h_q % h_k == 0
        differ = sink is not None or (q_descale is not None and q_descale.dim() != 2)
        group = h_q // h_k if has_group and wants and not differ else 1
        return cls(group, h_k, q.dim() == 4 and q.shape[1] == 1)

    def options(self, options: tuple) -> tuple:
        return options if self.group == 1 else (*options, self.group)

    def lengths(self, given: Lengths) -> Lengths:
        if self.group == 1 or given.cu_seqlens_q is None:
            return given
        return given._replace(cu_seqlens_q=given.cu_seqlens_q * self.group)

    def rows(self, longest: int | None) -> int | None:
        return None if longest is None else longest * self.group

    def targets(self, q, v_cache, out) -> tuple[Tensor | None, Tensor | None]:
        """out, and what attention is to write, which is None where out is made of its result."""
        if self.group == 1 or not self.has_views:
            return out, out if self.group == 1 else None
        if out is None:
            dtype = torch.bfloat16 if q.dtype in BYTE_DTYPES else q.dtype
            out = q.new_empty(*q.shape[:-1], v_cache.shape[-1], dtype=dtype)
        return out, self.pack(out)

    def pack(self, x: Tensor) -> Tensor:
        """(.., s_q, h_q, d) -> (.., s_q * group, h_k, d)"""
        if self.group == 1:
            return x
        return x.unflatten(-2, (self.h_k, self.group)).transpose(-2, -3).flatten(-4, -3)

    def unpack(self, x: Tensor) -> Tensor:
        """The other way."""
        if self.group == 1:
            return x
        return x.unflatten(-3, (-1, self.group)).transpose(-2, -3).flatten(-3, -2)

    def unpack_lse(self, lse: Tensor) -> Tensor:
        """(.., h_k, s_q * group) -> (.., h_q, s_q)"""
        if self.group == 1:
            return lse
        return lse.unflatten(-1, (-1, self.group)).transpose(-1, -2).flatten(-3, -2).contiguous()


def heads_of(q, k_cache, longest: int | None, pack_gqa) -> _Heads:
    """Of a call without a sink."""
    return _Heads.of(q, k_cache, longest, None, None, pack_gqa)


@dataclass(frozen=True)
class _Cache:
    """Where the keys and values of the sequences are, and how many they have."""

    k: Tensor
    v: Tensor
    batch: int
    seqlens: Tensor | None  # (batch,) int32
    page_table: Tensor | None  # (batch, pages) int32; None: sequence i has entry i
    leftpad: Tensor | None  # (batch,) int32

    @classmethod
    def of(cls, q, k, v, batch, seqlens, page_table, batch_idx, leftpad) -> "_Cache":  # noqa: PLR0913
        if seqlens is not None and not isinstance(seqlens, Tensor):
            seqlens = int_of("cache_seqlens", seqlens)
            seqlens = torch.full((batch,), seqlens, dtype=torch.int32, device=q.device)
        numbers = {"seqlens": seqlens, "batch_idx": batch_idx, "leftpad": leftpad}
        for name, x in ((f"cache_{name}", x) for name, x in numbers.items()):
            if x is not None:
                check_tensors(**{name: x})
                check_like(name, Layout.of(x), (batch,), torch.int32, q.device)
        if page_table is not None:
            check_tensors(page_table=page_table)
            if page_table.dim() != 2:
                shape = tuple(page_table.shape)
                raise ValueError(f"page_table has shape {shape}, expected (batch, pages)")
            if batch_idx is not None:
                page_table = page_table.index_select(0, batch_idx)
        elif batch_idx is not None:  # an entry of the cache is a page that holds all
            page_table = batch_idx[:, None]
        elif leftpad is not None:
            page_table = _own_entries(batch, k.device)
        return cls(k, v, batch, seqlens, page_table, leftpad)

    @property
    def capacity(self) -> int:
        """Rows that a sequence may have."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def lengths(self, cu_seqlens_q, new: "_New | None") -> Lengths:
        """For attention, when the new rows are there."""
        used = self.seqlens if new is None else self.seqlens + new.counts
        return lengths.given(cu_seqlens_q, None, None, used, self.page_table, self.leftpad)

    def check_room(self, num_new: int | Tensor) -> None:
        """Wait for the device and see that all rows fit."""
        if self.seqlens is None:
            return
        ends = (self.seqlens + num_new).tolist()
        for i, (begin, end) in enumerate(zip(self.seqlens.tolist(), ends, strict=True)):
            if begin < 0 or end > self.capacity:
                more = f" and k has {end - begin} more rows" if end > begin else ""
                raise ValueError(
                    f"cache_seqlens[{i}] is {begin}{more}, expected 0 to {self.capacity}, the rows "
                    "that its cache has"
                )

    def table(self) -> Tensor:
        if self.page_table is not None:
            return self.page_table
        return _own_entries(self.batch, self.k.device)


def _own_entries(batch: int, device) -> Tensor:
    return torch.arange(batch, dtype=torch.int32, device=device)[:, None]


@dataclass(frozen=True)
class _New:
    """Keys and values that join the cache."""

    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, cache: _Cache, q, k, v, cu_seqlens) -> "_New | None":
        if k is None and v is None:
            return None  # SGLang then gives cu_seqlens_k_new nevertheless
        for name, x, other in (("k", k, "v"), ("v", v, "k")):
            if x is None:
                raise ValueError(f"{name} is None but {other} is a tensor, expected both or none")
        if cache.seqlens is None:
            raise ValueError("cache_seqlens is None but k is a tensor, expected where k goes")
        check_tensors(k=k, v=v)
        if cu_seqlens is not None:
            check_tensors(cu_seqlens_k_new=cu_seqlens)
            shape = (cache.batch + 1,)
            check_like("cu_seqlens_k_new", Layout.of(cu_seqlens), shape, torch.int32, k.device)
        rows = (cache.batch, k.shape[1]) if cu_seqlens is None else (k.shape[0],)
        for name, x, of_cache in (("k", k, cache.k), ("v", v, cache.v)):
            shape = *rows, *of_cache.shape[2:]
            check_like(name, Layout.of(x), shape, _dtype_of_new(q, k, of_cache), of_cache.device)
        return cls(k, v, cu_seqlens)

    @property
    def counts(self) -> int | Tensor:
        return self.k.shape[1] if self.cu_seqlens is None else self.cu_seqlens.diff()

    def append(self, cache: _Cache, rotary: "_Rotary | None", descales: Descales) -> None:
        angles = (None, None, None) if rotary is None else rotary.angles
        kind = {} if rotary is None else {"interleaved": rotary.interleaved}
        where = cache.table(), cache.seqlens, self.cu_seqlens
        if self.k.dtype != cache.k.dtype:
            kind |= {"k_descale": descales.k_descale, "v_descale": descales.v_descale}
        append.append(self.k, self.v, cache.k, cache.v, *where, *angles, **kind)


def _dtype_of_new(q: Tensor, k: Tensor, cache: Tensor) -> torch.dtype:
    """What k and v are to have: beside 16-bit q its dtype; else that of the cache, or 16 bits."""
    if q.dtype in DTYPES:
        return q.dtype if cache.dtype in BYTE_DTYPES else cache.dtype
    return k.dtype if k.dtype in DTYPES and cache.dtype in WIDENED_DTYPES else cache.dtype


@dataclass(frozen=True)
class _Rotary:
    cos: Tensor  # (positions, n / 2)
    sin: Tensor
    seqlens: Tensor  # (batch,) int32: the position of each sequence's first new row
    interleaved: bool

    @classmethod
    def of(cls, q, cache: _Cache, cos, sin, seqlens, interleaved) -> "_Rotary | None":  # noqa: PLR0913
        interleaved = bool_of("rotary_interleaved", interleaved)
        if cos is None and sin is None:
            return None
        for name, x, other in (("cos", cos, "sin"), ("sin", sin, "cos")):
            if x is None:
                raise ValueError(f"rotary_{name} is None but rotary_{other} is a tensor")
        check_tensors(rotary_cos=cos, rotary_sin=sin)
        if q.dtype in BYTE_DTYPES and q.dtype not in WIDENED_DTYPES:
            raise ValueError(
                f"rotary_cos is a tensor but q has dtype {q.dtype}, expected None: rotate q and k "
                "before they are quantised"
            )
        half, unit = cos.shape[-1], ROTARY_UNIT // 2
        if cos.dim() != 2 or half % unit or 2 * half > q.shape[-1] or 0 in cos.shape:
            raise ValueError(
                f"rotary_cos has shape {tuple(cos.shape)}, expected (positions, n / 2) with n a "
                f"multiple of {ROTARY_UNIT} up to {q.shape[-1]}, the head dim of q"
            )
        dtype = q.dtype
        if q.dtype in BYTE_DTYPES and cos.dtype in OUT_DTYPES:  # finer than FA3 has them
            dtype = cos.dtype
        check_like("rotary_cos", Layout.of(cos), cos.shape, dtype, q.device)
        check_like("rotary_sin", Layout.of(sin), cos.shape, dtype, q.device)
        name = "cache_seqlens" if seqlens is None else "rotary_seqlens"
        seqlens = cache.seqlens if seqlens is None else seqlens
        if seqlens is None:
            raise ValueError("cache_seqlens is None but rotary_cos is a tensor, expected positions")
        check_like(name, Layout.of(seqlens), (cache.batch,), torch.int32, q.device)
        return cls(cos, sin, seqlens, interleaved)

    @property
    def angles(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.cos, self.sin, self.seqlens

    def rotate(self, q: Tensor, cu_seqlens, options: tuple) -> Tensor:
        """Queries follow each other under a mask; without one all have the first one's position."""
        _, is_causal, left, right, *_ = options
        advances = is_causal or max(left, right) >= 0
        return append.rotate(q, *self.angles, cu_seqlens, self.interleaved, advances)
