"""What happens ahead of attention with a cache: new keys and values go there, rotated with q.

Both steps are operators of torch, which eager code calls, too.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .call.layout import Layout, check_address, odd_dimension
from .call.lengths import or_empty
from .call.problem import BYTE_DTYPES, DTYPES
from .call.scales import CacheScales, Descales
from .kernels.append_signature import AppendConfig, AppendSignature
from .launch import dispatch, jit
from .reference import append as reference

_KERNEL = "fa3.kernels.simple.append:Append"


@torch.library.custom_op("fa3::append", mutates_args=("k_cache", "v_cache"))
def append(  # noqa: PLR0913
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens: Tensor,
    cu_seqlens: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Row j of sequence i of k and v to position seqlens[i] + j of its cache, k rotated.

    k, v (b, s, h_k, d), or packed (total, h_k, d) with cu_seqlens; caches (num_pages, page_size,
    h_k, d); page_table (b, pages). rotary_cos and rotary_sin (positions, n / 2); k of bytes is
    rotated as e4m3. Rows that find no room, or a page that does not exist, are dropped. k_descale
    and v_descale (b, h_k) are for caches of bytes that get 16-bit rows: what is stored is the code
    nearest to value / descale.
    """
    if k.numel() == 0:
        return
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if (dim := odd_dimension(Layout.of(cache))) is not None or cache.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {tuple(cache.stride())}, expected 1 at the end and multiples "
                f"of 16 bytes elsewhere (dimension {-1 if dim is None else dim})"
            )
        check_address(name, cache)
    angles = None, None, None, None
    if rotary_cos is not None:
        first = seqlens if rotary_seqlens is None else rotary_seqlens
        angles = *_angles(k, rotary_cos, rotary_sin), first, 1
    k, v = (_readable(x if x.dim() == 4 else x[None]) for x in (k, v))
    narrows = BYTE_DTYPES[k_cache.dtype] if k.itemsize > k_cache.itemsize else None
    scales = None, None
    if narrows:
        scales = _descales_of(k_cache, seqlens.shape[0], k_descale, v_descale)
    signature = AppendSignature(*_of(k, rotary_cos, interleaved), narrows=narrows)
    tensors = _as_bytes(k, None, v, k_cache, v_cache)
    of_lengths = *or_empty((cu_seqlens,), k.device), seqlens.shape[0]
    _run_of(signature, k.device)(*tensors, page_table, seqlens, *of_lengths, *angles, *scales)


@torch.library.custom_op("fa3::rotate", mutates_args=())
def rotate(  # noqa: PLR0913
    q: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    seqlens: Tensor,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = True,
    advances: bool = True,
) -> Tensor:
    """q (b, s, h, d), or packed (total, h, d) with cu_seqlens, rotated.

    Row j of sequence i as at position seqlens[i] + j, or, if it does not advance, at seqlens[i].
    """
    x = _readable(q if q.dim() == 4 else q[None])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if q.numel():
        signature = AppendSignature(*_of(q, rotary_cos, interleaved), appends=False)
        of_lengths = *or_empty((cu_seqlens,), q.device), seqlens.shape[0]
        angles = *_angles(q, rotary_cos, rotary_sin), seqlens, int(advances)
        tensors = *_as_bytes(x, y), *(None,) * 5
        _run_of(signature, q.device)(*tensors, *of_lengths, *angles, None, None)
    return y.view(q.shape)


@append.register_fake
def _(*arguments, **named):
    pass


@rotate.register_fake
def _(q, *arguments, **named):
    return q.new_empty(q.shape)


def _descales_of(k_cache: Tensor, batch: int, k_descale, v_descale) -> tuple[Tensor, Tensor]:
    """(b, h_k) each, ones for None."""
    descales = Descales(None, k_descale, v_descale)
    layouts = (None if x is None else Layout.of(x) for x in descales)
    cache = Layout.of(k_cache)
    scales = CacheScales.of(cache, cache, Descales(*layouts), batch)
    _, k, v, _ = scales.views(k_cache.device, *descales)
    return k, v


def _of(x: Tensor, cos: Tensor | None, interleaved: bool) -> tuple:
    """dtype and rotary of a signature."""
    if x.dtype not in BYTE_DTYPES:
        dtype = DTYPES[x.dtype]
    else:
        dtype = "byte" if cos is None else BYTE_DTYPES[x.dtype]
    return dtype, None if cos is None else "interleaved" if interleaved else "halves"


def _angles(x: Tensor, *angles: Tensor) -> tuple[Tensor, ...]:
    """cos and sin as the kernel that rotates x reads them."""
    dtype = x.dtype if x.dtype in DTYPES else torch.float32
    return tuple(angle.to(dtype).contiguous() for angle in angles)


def _as_bytes(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x.view(torch.uint8) if x is not None and x.itemsize == 1 else x for x in tensors)


def _readable(x: Tensor) -> Tensor:
    """With all rows at multiples of 16 bytes."""
    is_odd = odd_dimension(Layout.of(x)) is not None or x.stride(-1) != 1 or x.data_ptr() % 16
    return x.clone(memory_format=torch.contiguous_format) if is_odd else x


@functools.lru_cache
def _run_of(signature: AppendSignature, device: torch.device) -> Callable:
    target = dispatch.target_of(device)
    if target.kind == "reference":
        return functools.partial(reference.run, signature)
    return jit.compile(_KERNEL, signature, AppendConfig(), target.kind, target.arch)
