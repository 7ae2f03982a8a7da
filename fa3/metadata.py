"""get_scheduler_metadata: the order of a step's work, made once for all layers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .attend import check_unused, options_of, splits_of
from .call import hints
from .call.layout import Layout, check_like, check_tensors
from .call.lengths import Lengths, or_empty
from .call.listed import ATTRIBUTE, Tiles
from .call.options import Options, bool_of, int_of
from .call.problem import BYTE_DTYPES, DTYPES, Problem
from .interface_cache import heads_of
from .launch import dispatch, jit

_KERNEL = "fa3.kernels.simple.metadata:ListQueries"


@hints.closed
def get_scheduler_metadata(  # noqa: PLR0913 - the signature is FA3's
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    *,
    kv_dtype=None,
    **unknown,
):
    """Which SM computes which tiles of a call with a cache, in which order, on the device.

        metadata = fa3.get_scheduler_metadata(batch, 1, longest, h_q, h_k, d, lengths, page_size=64)
        out = fa3.flash_attn_with_kvcache(..., scheduler_metadata=metadata)  # in every layer

    Without it each call makes such a list for itself, by a kernel ahead of its own; results are the
    same to the bit. Nothing waits for the device, so that a CUDA graph which holds this call makes
    a new list of other lengths at each replay.

    max_seqlen_q: the number of queries of each sequence, or with cu_seqlens_q (batch_size + 1,)
        what the call is given: tiles have fewer rows where no sequence has many.
    max_seqlen_k: at least the most keys of a sequence, new ones included: with num_splits=0 the
        number of splits goes by it.
    cache_seqlens: (batch_size,) int32 on the device of the call, or an int for all.
    cu_seqlens_k_new, max_seqlen_k_new, cache_leftpad: how many keys join those of the cache, and
        how many of it do not count. Like cache_seqlens they only balance the work: a list of other
        lengths of keys gives the same results.
    qkv_dtype: of q; kv_dtype: of the cache, by default the same.
    The others are those of the call: page_size None for a cache without pages, has_softcap for a
    softcap above 0. With a learnable_sink, and for flash_attn_varlen_func, pack_gqa is False.

    Returns a tensor of int32, which knows what it was made for: a call that it does not fit is
    refused. A copy does not know, and is trusted if it is large enough; beside one num_splits has
    to be given. Calls that share it must follow each other, as those of one stream do: where a
    kernel hands tiles out while it runs, the counter is in there.

    Raises: as flash_attn_with_kvcache.
    """
    if unknown:
        raise hints.unknown_argument(get_scheduler_metadata, next(iter(unknown)))
    check_unused(None, attention_chunk, pack_gqa)
    _, causal, left, right, sm_margin, _ = options_of(None, causal, window_size, sm_margin, 0.0)
    sizes = {
        "batch_size": batch_size,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "num_heads_q": num_heads_q,
        "num_heads_kv": num_heads_kv,
        "headdim": headdim,
        "headdim_v": headdim if headdim_v is None else headdim_v,
        "page_size": 0 if page_size is None else page_size,
        "max_seqlen_k_new": max_seqlen_k_new,
    }
    sizes = {name: int_of(name, x) for name, x in sizes.items()}
    for name, x in sizes.items():
        if x < 0:
            raise ValueError(f"{name} is {x}, expected at least 0")
    used = _keys_of(cache_seqlens, sizes, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad)
    plan = _plan_of(
        *list(sizes.values())[:-1],
        _dtype_of("qkv_dtype", qkv_dtype),
        _dtype_of("kv_dtype", qkv_dtype if kv_dtype is None else kv_dtype),
        cu_seqlens_q is not None,
        (causal, left, right, sm_margin, 1.0 if bool_of("has_softcap", has_softcap) else 0.0),
        splits_of(num_splits),
        pack_gqa,
        used.device,
    )
    metadata = used.new_empty(plan.tiles.scratch if plan.tiles else 0)
    if plan.run is not None:
        if plan.group > 1 and cu_seqlens_q is not None:
            cu_seqlens_q = cu_seqlens_q * plan.group
        plan.run(metadata, *or_empty((cu_seqlens_q,), used.device), used, *plan.scalars)
    setattr(metadata, ATTRIBUTE, plan.tiles)
    return metadata


class _Plan(NamedTuple):
    run: Callable | None  # takes the memory, cu_seqlens_q, seqused_k and the scalars
    tiles: Tiles | None
    group: int  # rows of a query
    scalars: tuple = ()


def _keys_of(cache_seqlens, sizes: dict, cu_seqlens_q, cu_new, leftpad) -> Tensor:
    """How many each sequence has when the new ones are there."""
    batch, device = sizes["batch_size"], None
    if not isinstance(cache_seqlens, Tensor):
        if cu_seqlens_q is not None:
            device = cu_seqlens_q.device
        number = int_of("cache_seqlens", cache_seqlens)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        cache_seqlens = torch.full((batch,), number, dtype=torch.int32, device=device)
    for name, x, count in (
        ("cache_seqlens", cache_seqlens, batch),
        ("cu_seqlens_q", cu_seqlens_q, batch + 1),
        ("cu_seqlens_k_new", cu_new, batch + 1),
        ("cache_leftpad", leftpad, batch),
    ):
        if x is not None:
            check_tensors(**{name: x})
            check_like(name, Layout.of(x), (count,), torch.int32, cache_seqlens.device)
    used = cache_seqlens
    if cu_new is not None:
        used = used + cu_new.diff()
    elif sizes["max_seqlen_k_new"]:
        used = used + sizes["max_seqlen_k_new"]
    used = used if leftpad is None else used - leftpad
    return used.contiguous()


def _dtype_of(name: str, dtype) -> torch.dtype:
    if dtype not in DTYPES | BYTE_DTYPES:
        raise TypeError(f"{name} is {dtype!r}, expected one of {', '.join(map(str, DTYPES))}, ..")
    return dtype


@functools.lru_cache(maxsize=4096)
def _plan_of(  # noqa: PLR0913
    batch: int,
    max_q: int,
    max_k: int,
    h_q: int,
    h_k: int,
    d: int,
    dv: int,
    page_size: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    is_packed: bool,
    options: tuple,
    num_splits: int,
    pack_gqa: bool | None,
    device: torch.device,
) -> _Plan:
    """As the call would be planned, of shapes alone."""
    rows = (batch * max_q,) if is_packed else (batch, max_q)
    q = torch.empty(*rows, h_q, d, dtype=q_dtype, device="meta")
    pages = -(-max_k // page_size) if page_size else 0
    cache = (max(pages, 1), page_size) if page_size else (batch, max_k)
    k = torch.empty(*cache, h_k, d, dtype=kv_dtype, device="meta")
    heads = heads_of(q, k, max_q if is_packed else None, pack_gqa)
    layouts = (
        Layout(x.shape, x.contiguous().stride(), x.dtype, device)
        for x in (heads.pack(q), k, k[..., :1].expand(*k.shape[:-1], dv).contiguous())
    )

    def numbers(*shape):
        return Layout(shape, (*shape[1:], 1), torch.int32, device)

    lengths = Lengths(
        numbers(batch + 1) if is_packed else None,
        seqused_k=numbers(batch),
        page_table=numbers(batch, pages) if page_size else None,
    )
    causal, left, right, sm_margin, softcap = options
    options = Options(None, causal, left, right, sm_margin, softcap, heads.group)
    problem = Problem.of(*layouts, options, lengths=lengths)
    if problem.is_empty or device.type == "meta" or problem.s_k == 0:
        return _Plan(None, None, heads.group)
    target = dispatch.target_of(device)
    if target.kind == "reference":
        return _Plan(None, Tiles.of(problem, None, 1, 0), heads.group)
    dispatch.forward(problem.signature, target)
    longest = heads.rows(max_q), max_k
    rows = ops.rows_of(problem, longest)
    config, num_ctas, number = ops.layout_of(problem, target, num_splits, longest, rows)
    from .kernels.scheduler import L2_BUDGET
    from .kernels.simple.metadata import ListSignature  # imports the DSL, as the kernel does

    is_dynamic = config.is_dynamic(problem.signature)
    sizes = config.tile_m, config.tile_n, is_dynamic, config.max_ctas
    signature = ListSignature(problem.mask.kind, *sizes)
    tiles = Tiles.of(problem, config, number, num_ctas)
    scalars = (
        *(problem.s_q, problem.s_k, batch, problem.h_q * number, h_k),
        *(problem.mask.left, problem.mask.right, num_ctas * config.ctas_per_sm),
        max(1, L2_BUDGET // ((d + dv) * kv_dtype.itemsize)),
        *(heads.group, number),
    )
    run = jit.compile(_KERNEL, signature, None, target.kind, target.arch)
    return _Plan(run, tiles, heads.group, scalars)
