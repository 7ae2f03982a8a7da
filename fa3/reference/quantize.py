"""The quantisation kernel in plain torch, for CPU tensors without the emulator."""

import dataclasses
import functools
import math

import torch

from ..kernels.quantize_signature import (
    LARGEST,
    LARGEST_FLOAT,
    SMALLEST_DESCALE,
    QuantizeSignature,
    sign_of,
)
from .ragged import Rows

BYTES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


def bind(signature: QuantizeSignature):
    """A function that is called as the kernel compiled for `signature` is."""
    return functools.partial(_ragged if signature.is_ragged else _quantize, signature)


def descale_of(peak: torch.Tensor, out: str) -> torch.Tensor:
    """Largest magnitudes -> descales, 1 where all is zero."""
    descale = (peak.clamp_max(LARGEST_FLOAT) * (1 / LARGEST[out])).clamp_min(SMALLEST_DESCALE)
    return descale.masked_fill_(peak == 0, 1.0)


def _ragged(signature, x, y, scales, mean, dot, errors, cu_seqlens, seqused, num_blocks):  # noqa: PLR0913
    """One sequence after another, as dense ones."""
    if signature.scales != "given":
        scales.fill_(1.0 if signature.scales == "block" else 0.0)
    if errors is not None:
        errors.zero_()
    dense = dataclasses.replace(signature, is_ragged=False)
    for i in range(cu_seqlens.numel() - 1 if cu_seqlens.numel() else x.shape[0]):
        rows, own = Rows.of(i, x.shape[1], cu_seqlens, seqused), slice(i, i + 1)
        if rows.length:
            _quantize(
                dense,
                rows.cut(x),
                None if y is None else rows.cut(y),
                scales[own] if signature.scales == "given" else rows.blocks(scales, signature.rows),
                None if mean is None else mean[own],
                None if dot is None else rows.cut(dot, dim=2),
                None if errors is None else rows.blocks(errors, signature.rows),
            )


def _quantize(signature, x, y, scales, mean, dot, errors, *of_lengths):
    """See fa3.kernels.quantize.Quantize.__call__ for the arguments."""
    _, s, h, d = x.shape
    values = x.transpose(1, 2).float()  # (b, h, s, d)
    values = values + 0 * values  # inf -> NaN
    if mean is not None:
        mean = mean.repeat_interleave(h // mean.shape[1], dim=1)[:, :, None]  # (b, h, 1, d)
    if signature.dot_with_mean:
        dot.copy_((values * mean).sum(dim=-1))
    if signature.subtract_mean:
        values = values - mean
    if signature.scales == "sum":
        scales.copy_(_blocks(values, signature.rows).sum(dim=3))
        return
    factor = 1.0  # still to be applied
    if signature.hadamard:
        values, factor = rotate(values), d**-0.5
    if signature.scales == "given":
        factors = factor * scales[:, :, None]  # (b, h, 1, d)
    else:
        peaks = _peaks(values, signature.rows) * factor  # (b, h, n, d)
        if signature.scales == "amax":
            scales.copy_(peaks)
            return
        scales.copy_(descale_of(peaks.amax(dim=-1), signature.out))
        factors = (factor / scales).repeat_interleave(signature.rows, dim=2)[:, :, :s, None]
    values = values * factors
    codes = _cast(values, signature.out)
    y.copy_(codes.view(torch.uint8).transpose(1, 2))
    if signature.sum_errors:
        lacking = (values - codes.float()).nan_to_num(0.0, 0.0, 0.0)
        errors.copy_(_blocks(lacking, signature.rows).sum(dim=3))


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Signs, then the Walsh-Hadamard transform of the last dimension; sqrt(d) times a rotation."""
    d = values.shape[-1]
    signs = [sign_of(c) for c in range(d)]
    values = values * torch.tensor(signs, dtype=values.dtype, device=values.device)
    for bit in range(d.bit_length() - 1):
        low, high = values.unflatten(-1, (-1, 2, 1 << bit)).unbind(-2)
        values = torch.stack((low + high, low - high), dim=-2).flatten(-3)
    return values


def _peaks(values: torch.Tensor, rows: int) -> torch.Tensor:
    """(b, h, s, d) -> largest magnitude of each channel and block of rows; NaN is none."""
    magnitudes = values.abs().nan_to_num(0.0, posinf=math.inf)
    return _blocks(magnitudes, rows).amax(dim=3)


def _blocks(values: torch.Tensor, rows: int) -> torch.Tensor:
    """(b, h, s, d) -> (b, h, n, rows, d), with zeros past the end."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[2] % rows))
    return padded.unflatten(2, (-1, rows))


def _cast(values: torch.Tensor, out: str) -> torch.Tensor:
    """Nearest even, saturating; int8 has no NaN and gets 0."""
    largest = LARGEST[out]
    values = values.clamp(-largest, largest)
    if out == "int8":
        values = values.round().nan_to_num(0.0)
    return values.to(BYTES[out])
