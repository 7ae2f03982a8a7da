"""What the backends share: what a call is, and how one that cannot run says so."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..cases import Case


class Scaled(NamedTuple):
    """An output of few bits; its value is `values * descale`."""

    values: Tensor
    descale: float

    def decoded(self) -> Tensor:
        return self.values.float() * self.descale


Call = Callable[[], Tensor | Scaled | tuple[Tensor, ...]]
Prepare = Callable[[Case, Tensor, Tensor, Tensor], Call]


class Absent(Exception):
    """The backend cannot run this case here; the text says why."""


def module(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation is as absent as none
        raise Absent(f"import {name}: {type(error).__name__}: {error}") from error


def first(result) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result
