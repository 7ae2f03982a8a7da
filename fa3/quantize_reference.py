"""The quantisation kernel in plain torch, for CPU tensors without the emulator."""

import functools

import torch

from .kernels.quantize_signature import LARGEST, SMALLEST_DESCALE, QuantizeSignature, sign_of

BYTES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


def bind(signature: QuantizeSignature):
    """A function that is called as the kernel compiled for `signature` is."""
    return functools.partial(_quantize, signature)


def descale_of(peak: torch.Tensor, out: str) -> torch.Tensor:
    """Largest magnitudes -> descales, 1 where all is zero."""
    descale = (peak / LARGEST[out]).clamp_min(SMALLEST_DESCALE)
    return descale.masked_fill_(peak == 0, 1.0)


def _quantize(signature, x, y, scales, mean, dot):
    """See fa3.kernels.quantize.Quantize.__call__ for the arguments."""
    b, s, h, d = x.shape
    values = x.transpose(1, 2).float()  # (b, h, s, d)
    if mean is not None:
        mean = mean.repeat_interleave(h // mean.shape[1], dim=1)[:, :, None]  # (b, h, 1, d)
    if signature.dot_with_mean:
        dot.copy_((values * mean).sum(dim=-1))
    if signature.subtract_mean:
        values = values - mean
    if signature.hadamard:
        values = rotate(values)
    values = values + 0 * values  # inf -> NaN
    if signature.scales == "given":
        factors = scales[:, :, None]  # (b, h, 1, d)
    else:
        blocks = _blocks(values.abs().nan_to_num(0.0), signature.rows)  # (b, h, n, rows, d)
        peaks = blocks.amax(dim=3)
        if signature.scales == "amax":
            scales.copy_(peaks)
            return
        scales.copy_(descale_of(peaks.amax(dim=-1), signature.out))
        factors = (1 / scales).repeat_interleave(signature.rows, dim=2)[:, :, :s, None]
    y.copy_(_cast(values * factors, signature.out).view(torch.uint8).transpose(1, 2))


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Signs, then the Walsh-Hadamard transform of the last dimension, by 1 / sqrt(d)."""
    d = values.shape[-1]
    signs = torch.tensor([sign_of(c) for c in range(d)], device=values.device)
    values = values * (signs * d**-0.5)
    stride = 1
    while stride < d:
        low, high = values.unflatten(-1, (-1, 2, stride)).unbind(-2)
        values = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    return values


def _blocks(magnitudes: torch.Tensor, rows: int) -> torch.Tensor:
    """(b, h, s, d) -> (b, h, ceil(s / rows), rows, d), filled up with zeros."""
    missing = -magnitudes.shape[2] % rows
    return torch.nn.functional.pad(magnitudes, (0, 0, 0, missing)).unflatten(2, (-1, rows))


def _cast(values: torch.Tensor, out: str) -> torch.Tensor:
    """Nearest even, saturating; int8 has no NaN and gets 0."""
    largest = LARGEST[out]
    values = values.clamp(-largest, largest)
    if out == "int8":
        values = values.round().nan_to_num(0.0)
    return values.to(BYTES[out])
