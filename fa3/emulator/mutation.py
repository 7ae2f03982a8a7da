"""Mutation runs: take one synchronising instruction at a time out of a kernel's PTX and see whether
the checks or the schedules notice.

    judge = Judge(run)                     # run() launches kernels and returns their outputs
    for mutant in judge.mutants:
        judge.verdict(mutant)              # "Race: ...", or None for a survivor
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from . import _installed_device as installed_device
from . import settings, source
from .errors import KernelError, Unsupported
from .ptx import parse

# kind of mutant -> instructions that are taken out
KINDS = {
    "fence": r"wgmma\.fence|fence\.|membar\.",
    "arrive": r"mbarrier\.arrive|bar\.arrive|barrier\.cluster\.arrive|cp\.async\.mbarrier\.arrive",
    "wait": r"mbarrier\.try_wait|mbarrier\.test_wait|wgmma\.wait_group|barrier\.cluster\.wait"
    r"|cp\.async\.bulk\.wait_group|cp\.async\.wait",
    "commit": r"wgmma\.commit_group|cp\.async\.bulk\.commit_group|cp\.async\.commit_group",
    "barrier": r"bar\.sync|bar\.warp\.sync|barrier\.sync",
}
_INSTRUCTION = re.compile(r"^(\s*(?:[\w$]+:\s*)?)(@!?%\w+\s+)?([a-z][\w.:]+)\s*(.*)$")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A kernel without the instruction in one line of its PTX."""

    ptx: str = dataclasses.field(repr=False)  # of the whole kernel
    line: int  # from 0
    kind: str
    instruction: str
    place: tuple[str, int]  # Python file and line, ("", 0) if unknown

    def edited(self) -> str:
        lines = self.ptx.split("\n")
        lines[self.line] = _without(lines[self.line])
        return "\n".join(lines)

    @property
    def source(self) -> str:
        """ "file.py:function: line" of the Python source, "" where that cannot be read."""
        text = source.line_at(*self.place)
        return (
            f"{Path(self.place[0]).name}:{source.function_at(*self.place)}: {text}" if text else ""
        )

    def __str__(self):
        path, line = self.place
        where = f"{Path(path).name}:{line}" if path else f"PTX line {self.line + 1}"
        return f"{self.kind:8}{where:20} {self.instruction[:50]}"


def _without(line: str) -> str:
    """A line of PTX without its instruction; a wait for an mbarrier succeeds at once."""
    label, guard, op, operands = _INSTRUCTION.match(line).groups(default="")
    if op.startswith(("mbarrier.try_wait", "mbarrier.test_wait")):
        return f"{label}{guard}setp.eq.u32 {operands.split(',')[0]}, 0, 0;"
    return label


def mutants(ptx: str) -> list[Mutant]:
    """All mutants of the kernels in a PTX module, in the order of its lines."""
    found = []
    for kernel in parse(ptx).kernels.values():
        for i in kernel.code:
            kind = next((k for k, pattern in KINDS.items() if re.match(pattern, i.op)), None)
            if kind:
                place = tuple(i.loc) if i.loc else ("", 0)
                found.append(Mutant(ptx, i.line - 1, kind, i.text, place))
    return found


class Judge:
    """Runs the mutants of the kernels that one call launches."""

    def __init__(
        self,
        run: Callable[[], Sequence],
        seeds: Iterable[int] = range(4),
        checks: str | Iterable[str] = settings.ALL_CHECKS,
    ):
        """run: as in compare_schedules().  seeds: of the random schedules that are tried."""
        self._run = run
        self._checks = tuple(c for c in settings.names(checks) if c != "late")
        self._schedules = [("eager", 0), ("late", 0), *(("random", seed) for seed in seeds)]
        device, texts = installed_device(), []

        def note(ptx: str) -> str:
            if ptx not in texts:
                texts.append(ptx)
                device.forget_executed(ptx)  # by other calls
            return ptx

        self._expected = self._outputs("eager", 0, note)
        self.mutants = [m for ptx in texts for m in mutants(ptx)]
        self._executed = {ptx: device.executed(ptx) for ptx in texts}

    def reaches(self, mutant: Mutant) -> bool:
        """Whether the call runs what was taken out."""
        return mutant.line + 1 in self._executed[mutant.ptx]

    def _outputs(self, schedule: str, seed: int, edit, **options) -> list[bytes]:
        with settings.options(
            checks=self._checks, schedule=schedule, seed=seed, edit=edit, **options
        ):
            return [_bytes(x) for x in self._run()]

    def verdict(self, mutant: Mutant) -> str | None:
        """What caught a mutant, as "SCHEDULE: error or difference"; None if nothing did."""
        edited = mutant.edited()

        def edit(ptx: str) -> str:
            return edited if ptx == mutant.ptx else ptx

        for schedule, seed in self._schedules:
            name = f"random {seed}" if schedule == "random" else schedule
            try:
                outputs = self._outputs(schedule, seed, edit, instruction_limit=2_000_000)
            except Unsupported:
                raise
            except KernelError as error:
                return f"{name}: {type(error).__name__}"
            if outputs != self._expected:
                return f"{name}: other results"
        return None


def _bytes(x) -> bytes:
    if hasattr(x, "detach"):
        import torch

        x = x.detach().contiguous().view(-1, 1).view(torch.uint8).numpy()
    return np.ascontiguousarray(x).tobytes()
