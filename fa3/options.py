"""The arguments of a call that are no tensors, and what may be given for a number."""

import sys
from numbers import Integral, Real
from typing import NamedTuple

import numpy
import torch

from .transforms import has_tangent


class Options(NamedTuple):
    """The arguments of a call that are no tensors."""

    softmax_scale: float | None = None  # None: 1 / sqrt(d)
    causal: bool = False
    window_left: int = -1  # below 0: no bound
    window_right: int = -1
    sm_margin: int = 0  # SMs left to other kernels

    @classmethod
    def of(cls, softmax_scale, causal, window_left, window_right, sm_margin) -> "Options":
        """The same as Python's or torch's numbers, as an operator takes them.

        Raises:
            TypeError: one of them is no such number; the message names the argument.
            ValueError: softmax_scale is beyond all floats.
        """
        return cls(
            _scale_as_given(softmax_scale),
            bool_of("causal", causal),
            int_of("window_size (left)", window_left),
            int_of("window_size (right)", window_right),
            int_of("sm_margin", sm_margin),
        )


def _scale_as_given(value):
    """A float, None, or a symbol that stands for a float."""
    if value is None or isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, torch.Tensor):
        return _value_of(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"softmax_scale is {value!r}, expected a number or None")
    try:
        return float(value)
    except OverflowError:
        largest = sys.float_info.max
        raise ValueError(f"softmax_scale is beyond {largest:.2g}, the largest float") from None


def _value_of(scale: torch.Tensor) -> float:
    """Read a softmax_scale from its device."""
    if scale.dim() or scale.is_complex() or scale.dtype == torch.bool:
        raise TypeError(
            f"softmax_scale is a tensor of shape {tuple(scale.shape)} and dtype {scale.dtype}, "
            "expected a number, a real tensor without dimensions or None"
        )
    if scale.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "softmax_scale has requires_grad=True, but it has no derivative: detach it"
        )
    if has_tangent(scale):
        raise NotImplementedError("softmax_scale has a tangent, but it has no derivative")
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            "softmax_scale is a tensor, as sizes are within torch.jit.trace, which would keep its "
            "value: leave it out for 1 / sqrt(d), or pass a number made outside of the trace"
        )
    return scale.item()


def bool_of(name: str, value) -> bool:
    if isinstance(value, torch.SymBool):
        return value
    if not isinstance(value, bool | numpy.bool_):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def int_of(name: str, value) -> int:
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, expected an int")
    return int(value)
