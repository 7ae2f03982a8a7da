"""Appending to a cache, and rotation, in plain torch for CPU tensors."""

import torch
from torch import Tensor

from ..kernels.append_signature import AppendSignature

E4M3 = torch.finfo(torch.float8_e4m3fn)


def run(  # noqa: PLR0913 - the arguments are the kernel's
    signature: AppendSignature,
    x: Tensor,
    y: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    pages: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor,
    num_sequences: int,
    cos: Tensor | None,
    sin: Tensor | None,
    first: Tensor | None,
    advances: int | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    """As `kernels.simple.append.Append.__call__`."""
    for i in range(num_sequences):
        entry, start, end = i, 0, x.shape[1]
        if cu_seqlens.numel():
            entry, (start, end) = 0, cu_seqlens[i : i + 2].tolist()
        index = torch.arange(end - start, dtype=torch.int64, device=x.device)
        rows = x[entry, start:end]
        if signature.rotary:
            position = (first[i] + index * advances).clamp(0, cos.shape[0] - 1)
            angles = cos[position], sin[position], signature.rotary
            if signature.dtype == "e4m3":
                rows = codes(rotated(rows.view(torch.float8_e4m3fn).float(), *angles))
            else:
                rows = rotated(rows, *angles)
        if not signature.appends:
            y[entry, start:end] = rows
            continue
        new_v = v[entry, start:end]
        for new, cache, scales in ((rows, k_cache, k_scales), (new_v, v_cache, v_scales)):
            new = new if scales is None else narrowed(new, scales[i])
            num_pages, page_size = cache.shape[:2]
            position = seqlens[i] + index
            fits = (position >= 0) & (position < pages.shape[1] * page_size)
            page = pages[i, position[fits] // page_size]
            exists = (page >= 0) & (page < num_pages)
            place = page[exists], position[fits][exists] % page_size
            cache[place] = new[fits][exists]


def narrowed(x: Tensor, scale: Tensor) -> Tensor:
    """x (n, h, d) and scale (h,) -> codes of e4m3 as bytes: the nearest ones."""
    return codes(x.float() / scale[:, None])


def codes(x: Tensor) -> Tensor:
    """fp32 -> e4m3 as bytes."""
    return x.clamp(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn).view(torch.uint8)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    """x (n, h, d), cos and sin (n, m / 2): the first m columns are turned, in fp32."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    cos, sin = (angle.float()[:, None] for angle in (cos, sin))
    if kind == "interleaved":
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
