"""The arguments of a call that are no tensors, and what may be given for a number."""

import sys
from numbers import Integral, Real
from typing import NamedTuple

import numpy
import torch

from ..transforms import has_tangent


class Options(NamedTuple):
    """The arguments of a call that are no tensors."""

    softmax_scale: float | None = None  # None: 1 / sqrt(d)
    causal: bool = False
    window_left: int = -1  # below 0: no bound
    window_right: int = -1
    sm_margin: int = 0  # SMs left to other kernels
    softcap: float = 0.0  # bound of the scores; 0: none
    rows_per_query: int = 1  # heads of a query that follow each other in the rows of q and out

    @classmethod
    def of(  # noqa: PLR0913
        cls, softmax_scale, causal, window_left, window_right, sm_margin, softcap=0.0
    ) -> "Options":
        """The same as Python's or torch's numbers, as an operator takes them.

        Raises:
            TypeError: one of them is no such number; the message names the argument.
            ValueError: softmax_scale or softcap is beyond all floats.
        """
        return cls(
            None if softmax_scale is None else _real("softmax_scale", softmax_scale),
            bool_of("causal", causal),
            int_of("window_size (left)", window_left),
            int_of("window_size (right)", window_right),
            int_of("sm_margin", sm_margin),
            0.0 if softcap is None else _real("softcap", softcap),
        )


def _real(name: str, value):
    """A float, or a symbol that stands for one."""
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, torch.Tensor):
        return _value_of(name, value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a number or None")
    try:
        return float(value)
    except OverflowError:
        largest = sys.float_info.max
        raise ValueError(f"{name} is beyond {largest:.2g}, the largest float") from None


def _value_of(name: str, value: torch.Tensor) -> float:
    """Read a number from its device."""
    if value.dim() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"{name} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}, "
            "expected a number, a real tensor without dimensions or None"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name} has requires_grad=True, but it has no derivative: detach it"
        )
    if has_tangent(value):
        raise NotImplementedError(f"{name} has a tangent, but it has no derivative")
    _refuse_trace(name, "leave it out, or ")
    return value.item()


def _refuse_trace(name: str, instead: str = "") -> None:
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            f"{name} is a tensor, as sizes are within torch.jit.trace, which would keep its "
            f"value: {instead}pass a number made outside of the trace"
        )


def bool_of(name: str, value) -> bool:
    if isinstance(value, torch.SymBool):
        return value
    if not isinstance(value, bool | numpy.bool_):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def int_of(name: str, value) -> int:
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, torch.Tensor):
        return _int_in(name, value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, expected an int")
    return int(value)


def _int_in(name: str, tensor: torch.Tensor) -> int:
    """Read an int from its device, as torch's own operators do."""
    is_integer = not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.dim() or not is_integer or tensor.dtype == torch.bool:
        raise TypeError(
            f"{name} is a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}, "
            "expected an int or an integer tensor without dimensions"
        )
    _refuse_trace(name)
    return tensor.item()
