"""Reads a compiled sm_90a kernel on any machine: what it occupies and what its loops issue.

elf        sections of the cubin             loops      main loops, their instruction mix
resources  registers, memory                 hazards    serialised MMAs, spills, setmaxnreg
sass       disassembly by nvdisasm           report     all of it about one kernel, as text
flow       blocks, dominators, loops         cli        `python -m fa3 inspect`
"""

from .report import Report, analyse
from .sass import DisassemblerMissing

__all__ = ["DisassemblerMissing", "Report", "analyse"]
