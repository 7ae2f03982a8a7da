"""Where in the kernel an error happened: Python line, PTX instruction, CTA and warps."""

from __future__ import annotations

import numpy as np

from ..errors import Deadlock, EmulatorError, KernelError, Runaway
from ..naming import named
from ..ptx import Instr, Kernel, Location
from ..source import function_at
from .fragments import RUNNING

_LINES = 4  # of a loop that are named


def place(instr: Instr | None) -> str:
    """ "kernel.py:12 in store (PTX line 34: add.s32 ...)" """
    if instr is None:
        return "the end of the kernel"
    ptx = f"PTX line {instr.line}: {instr.text[:90]}"
    return f"{_python(instr.loc)} ({ptx})" if instr.loc else ptx


def _python(loc: Location) -> str:
    function = function_at(*loc)
    return f"{loc} in {function}" if function else str(loc)


def _instruction(kernel, pc: int) -> Instr | None:
    return kernel.code[pc] if 0 <= pc < len(kernel.code) else None


def located(error: Exception, w) -> EmulatorError:
    """A copy of an error raised while w was running, with its place in the text and in .source."""
    kernel, fr = w.launch.kernel, w.current
    pc = getattr(error, "site", None)
    if pc is None:
        pc = w.launch.lowered.pc_of(error)
    instr = _instruction(kernel, fr.pc if pc is None else pc)
    kind = type(error) if isinstance(error, EmulatorError) else KernelError
    text = f"{error}" if isinstance(error, EmulatorError) else f"{type(error).__name__}: {error}"
    text = named(text, kernel, w.launch.dynamic_smem)
    found = kind(
        f"{text}\n  at {place(instr)}\n  in CTA {w.cta.position}, warps "
        f"{w.warps(fr.mask)} of kernel {kernel.name[:60]}"
    )
    found.source = str(instr.loc) if instr is not None and instr.loc else ""
    return found


def deadlock(warpgroups) -> Deadlock:
    """Where each fragment is blocked, and which warps are gone."""
    return Deadlock("\n".join(["deadlock: every warp is blocked", *_states(warpgroups)]))


def runaway(warpgroups, limit: int) -> Runaway:
    """Which loops the warps are in."""
    lines = [f"more than {limit} instructions in one cluster: an endless loop?"]
    error = Runaway("\n".join([*lines, *_states(warpgroups)]))
    error.source = _source(warpgroups)
    return error


def _source(warpgroups) -> str:
    """The first Python line of those that warps are running in."""
    running = [(f.pc, w) for w in warpgroups for f in w.fragments if f.state == RUNNING]
    pc, w = min(running, key=lambda x: x[0], default=(0, warpgroups[0]))
    instr = _instruction(w.launch.kernel, pc)
    return str(instr.loc) if running and instr is not None and instr.loc else ""


def _states(warpgroups) -> list[str]:
    """One line per fragment."""
    lines = []
    for w in warpgroups:
        kernel = w.launch.kernel
        for f in w.fragments:
            where = place(_instruction(kernel, f.site))
            waits = named(f.describe(), kernel, w.launch.dynamic_smem)
            lines.append(
                f"  CTA {w.cta.position} warps {w.warps(f.mask)} ({int(f.mask.sum())} "
                f"lanes): {waits} at {where}{_loop(kernel, f.site)}"
            )
        if gone := w.warps(~w.live & (np.arange(w.lanes) < w.launch.threads - w.first_thread)):
            lines.append(f"  CTA {w.cta.position} warps {gone}: lanes of them have left")
    return lines


def _loop(kernel: Kernel, pc: int) -> str:
    """The Python lines of the innermost loop around pc."""
    loops = (
        (kernel.labels[i.args[0][1]], end)
        for end, i in enumerate(kernel.code)
        if i.parts[0] == "bra" and kernel.labels[i.args[0][1]] <= pc <= end
    )
    first, last = min(loops, key=lambda x: x[1] - x[0], default=(0, -1))
    if last < first:
        return ""
    body = kernel.code[first : last + 1]
    lines = list(dict.fromkeys(_python(i.loc) for i in body if i.loc))
    text = ", ".join(lines[:_LINES]) + (", ..." if len(lines) > _LINES else "")
    return f"\n    in the loop of PTX lines {body[0].line}..{body[-1].line}" + (
        text and f": {text}"
    )
