"""Runs a few lines of PTX on the emulator without the DSL."""

import numpy as np

from fa3.emulator.checks import Checks
from fa3.emulator.execution.launch import Launch
from fa3.emulator.memory.regions import GlobalMemory
from fa3.emulator.ptx import parse

HEADER = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 k_param_0)
{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
    .reg .f32 %f<9>; .reg .f64 %fd<9>;
    .shared .align 16 .b8 buffer[4096];
    ld.param.u64 %rd0, [k_param_0];
    mov.u32 %r0, %tid.x;
"""


def prepared(
    body,
    array,
    threads=128,
    *,
    grid=1,
    cluster=1,
    checks=(),
    header=HEADER,
    limit=100_000,
    profile=None,
    **options,
) -> Launch:
    """A launch of a kernel; %rd0 holds its parameter, the address of array, and %r0 is %tid.x.

    options: further fields of Launch.
    """
    kernel = parse(header + body + "\nret;\n}\n").kernels["k"]
    memory = GlobalMemory()
    memory.add(array.ctypes.data, array.nbytes)
    params = np.zeros(16, np.uint8)
    params[:8].view(np.uint64)[0] = array.ctypes.data
    return Launch(
        kernel,
        (grid, 1, 1),
        (threads, 1, 1),
        (cluster, 1, 1),
        0,
        params,
        memory,
        Checks(checks),
        limit,
        record=profile,
        **options,
    )


def launch(body, array, threads=128, **options) -> dict:
    """Run what prepared() makes of the same arguments; returns the statistics."""
    return prepared(body, array, threads, **options).run()


def lanes(instructions, result="%r9", inputs=(), threads=128, size=4):
    """The value of a register in every lane after some instructions.

    inputs are arrays of 4- or 8-byte elements; lane i finds element i of them in %r1, %r2 ... or
    %rd1, %rd2 ...
    """
    width = max([size] + [x.dtype.itemsize for x in inputs])
    table = np.zeros((len(inputs) + 1, threads), f"u{width}")
    body = f"mul.wide.u32 %rd7, %r0, {width}; add.s64 %rd8, %rd0, %rd7;\n"
    for i, x in enumerate(inputs, 1):
        unsigned = x.view(f"u{x.dtype.itemsize}")
        table[i, : len(x)] = unsigned
        kind, bank = ("b64", "%rd") if x.dtype.itemsize == 8 else ("b32", "%r")
        body += f"ld.global.{kind} {bank}{i}, [%rd8+{i * threads * width}];\n"
    body += f"{instructions}\nst.global.b{8 * size} [%rd8], {result};"
    launch(body, table, threads)
    return table[0].astype(f"u{size}")
