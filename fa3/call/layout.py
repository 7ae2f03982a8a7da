"""Layout: what a check may know of one tensor, and what TMA asks of its strides and address."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

ALIGNMENT = 16  # bytes: TMA's unit for addresses and strides
MAX_STRIDE = 2**40  # bytes: TMA's strides have 40 bits


class Layout(NamedTuple):
    """What a check may know of a tensor: everything but its address."""

    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Layout":
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def check_tensors(**tensors: torch.Tensor) -> None:
    """All are tensors with a place in memory for every element."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else f"of layout {tensor.layout}"
            raise ValueError(f"{name} is {kind}, expected a dense tensor, of torch.strided")


def check_like(name: str, layout: Layout, shape, dtype, device) -> None:
    for what, given, wanted in (
        ("shape", tuple(layout.shape), tuple(shape)),
        ("dtype", layout.dtype, dtype),
        ("device", layout.device, device),
    ):
        if given != wanted:
            raise ValueError(f"{name} has {what} {given}, expected {wanted}")


def check_last_stride(name: str, layout: Layout) -> None:
    if 0 not in layout.shape and layout.stride[-1] != 1:
        raise ValueError(f"{name} has stride {layout.stride[-1]} in its last dimension, expected 1")


def _suits_tma(layout: Layout) -> bool:
    """Whether TMA can express all strides: its unit is 16 bytes."""
    size = layout.dtype.itemsize
    for step in layout.stride[:-1]:
        if step * size % ALIGNMENT or step * size >= MAX_STRIDE:
            return False
    return True


def odd_dimension(layout: Layout) -> int | None:
    """The first dimension whose stride TMA cannot express."""
    if _suits_tma(layout):
        return None
    size = layout.dtype.itemsize
    for dim, (n, step) in enumerate(zip(layout.shape[:-1], layout.stride, strict=False)):
        if n > 1 and (step * size % ALIGNMENT or step * size >= MAX_STRIDE):
            return dim
    return None


def tma_strides(layout: Layout) -> tuple[int, ...] | None:
    """Strides that TMA accepts where a dimension of size 1 has an arbitrary one; else None."""
    if layout.shape[-1] != 1 and _suits_tma(layout):
        return None
    size = layout.dtype.itemsize
    fixed = tuple(
        layout.shape[-1]
        if n == 1 and (step * size % ALIGNMENT or step * size >= MAX_STRIDE)
        else step
        for n, step in zip(layout.shape, layout.stride, strict=True)
    )
    return None if fixed == tuple(layout.stride) else fixed


def check_address(name: str, tensor: torch.Tensor, alignment: int = ALIGNMENT) -> None:
    offset = tensor.data_ptr() % alignment
    if offset:
        raise ValueError(
            f"{name} starts {offset} bytes past a multiple of {alignment} bytes, expected 0"
        )


def check_disjoint(out: torch.Tensor, **inputs: torch.Tensor) -> None:
    """out may share its storage with an input, but not the span of memory that it covers."""
    start, end = _span(out)
    for name, tensor in inputs.items():
        first, last = _span(tensor)
        if start < last and first < end:
            raise ValueError(
                f"out covers the addresses {start:#x} to {end:#x}, which overlap those of {name}, "
                f"{first:#x} to {last:#x}"
            )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and the one after the last."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((n - 1) * step for n, step in steps)
    return tensor.data_ptr(), tensor.data_ptr() + count * tensor.itemsize
