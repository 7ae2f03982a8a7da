"""What a kernel occupies, from the `.nv.info` attributes that the driver reads at load time."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .elf import Cubin

# Attribute numbers as nvdisasm names them (EIATTR_*).
MAX_THREADS, REQNTID, FRAME_SIZE, MIN_STACK_SIZE = 0x05, 0x10, 0x11, 0x12
REGCOUNT, NUM_BARRIERS = 0x2F, 0x4C
NO_VALUE, BYTE, HALF, SIZED = 1, 2, 3, 4


@dataclass(frozen=True)
class Resources:
    """A kernel's fixed resources, in bytes where not said otherwise."""

    name: str
    sm: int  # 90 for sm_90a
    threads: int  # of a CTA, as .reqntid demands or .maxntid allows; 0: not fixed
    registers: int  # per thread at launch, before any setmaxnreg
    frame: int  # of local memory per thread: spills and local arrays
    stack: int  # least stack per thread, calls included
    static_smem: int  # dynamic shared memory is an argument of the launch, not in the cubin
    constants: int  # bank 0: parameters and what the driver puts before them
    named_barriers: int
    code: int


def read(cubin: Cubin, kernel: str) -> Resources:
    """Raises ValueError when the cubin has no such kernel."""
    text = cubin.section(f".text.{kernel}")
    if text is None:
        raise ValueError(f"no kernel {kernel!r} in the cubin, it has {cubin.kernels()}")
    shared = cubin.section(f".nv.shared.{kernel}")
    constants = cubin.section(f".nv.constant0.{kernel}")
    own = dict(_attributes(_data(cubin, f".nv.info.{kernel}")))
    common = {
        (attribute, cubin.symbols[symbol]): value
        for attribute, symbol, value in _per_symbol(_data(cubin, ".nv.info"))
    }
    return Resources(
        name=kernel,
        sm=cubin.sm,
        threads=_product(own.get(REQNTID) or own.get(MAX_THREADS, b"")),
        registers=common.get((REGCOUNT, kernel), 0),
        frame=common.get((FRAME_SIZE, kernel), 0),
        stack=common.get((MIN_STACK_SIZE, kernel), 0),
        static_smem=shared.size if shared else 0,
        constants=constants.size if constants else 0,
        named_barriers=own.get(NUM_BARRIERS, b"\0")[0],
        code=text.size,
    )


def _data(cubin: Cubin, name: str) -> bytes:
    section = cubin.section(name)
    return section.data if section else b""


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, value) of an info section; see NVIDIA's names in `nvdisasm` output."""
    at = 0
    while at + 4 <= len(data):
        form, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == SIZED:
            yield attribute, data[at : at + value]
            at += value
        elif form in (NO_VALUE, BYTE, HALF):
            yield attribute, struct.pack("<H", value)
        else:
            raise ValueError(f"unknown form {form} of attribute {attribute:#x} in .nv.info")


def _per_symbol(data: bytes) -> Iterator[tuple[int, int, int]]:
    for attribute, value in _attributes(data):
        if len(value) == 8:
            yield attribute, *struct.unpack("<II", value)


def _product(value: bytes) -> int:
    """Threads of a CTA from its three dimensions."""
    if len(value) != 12:
        return 0
    x, y, z = struct.unpack("<III", value)
    return x * y * z
