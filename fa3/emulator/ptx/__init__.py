"""PTX text -> kernels: parameters, shared symbols, registers, flat instruction lists."""

from .model import Instr, Kernel, Location, Module, Param
from .parser import parse

__all__ = ["Instr", "Kernel", "Location", "Module", "Param", "parse"]
