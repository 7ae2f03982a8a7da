"""Where in the kernel an error happened: Python line, PTX instruction, CTA and warps."""

from __future__ import annotations

from ..errors import EmulatorError, KernelError
from ..ptx import Instr


def place(instr: Instr | None) -> str:
    """ "kernel.py:12 (PTX line 34: add.s32 ...)" """
    if instr is None:
        return "the end of the kernel"
    ptx = f"PTX line {instr.line}: {instr.text[:90]}"
    return f"{instr.loc} ({ptx})" if instr.loc else ptx


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
    found = kind(
        f"{text}\n  at {place(instr)}\n  in CTA {w.cta.position}, warps "
        f"{w.warps(fr.mask)} of kernel {kernel.name[:60]}"
    )
    found.source = str(instr.loc) if instr is not None and instr.loc else ""
    return found


def deadlock(warpgroups) -> str:
    return whereabouts("deadlock: every warp is blocked", warpgroups)


def whereabouts(what: str, warpgroups) -> str:
    """What is wrong, and a line for each fragment that is still there."""
    lines = [what]
    for w in warpgroups:
        for f in w.fragments:
            instr = _instruction(w.launch.kernel, f.site)
            lines.append(
                f"  CTA {w.cta.position} warps {w.warps(f.mask)} ({int(f.mask.sum())} "
                f"lanes): {f.describe()} at {place(instr)}"
            )
    return "\n".join(lines)
