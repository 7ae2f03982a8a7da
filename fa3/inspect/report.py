"""Report: everything known about one compiled kernel without running it."""

from dataclasses import asdict, dataclass

from . import hazards, resources, sass
from .elf import Cubin
from .flow import Flow
from .hazards import Local, RegisterChange
from .loops import MainLoop, loops_beside, main_loops
from .mix import Mix
from .resources import Resources
from .sass import Program

SMS = (80, 86, 87, 89, 90)  # what cubins are read of
SMALL = 6  # slots of a block that gets no line of its own


@dataclass(frozen=True)
class Report:
    resources: Resources
    instructions: int
    mmas: int  # in the whole kernel
    local: Local
    register_changes: tuple[RegisterChange, ...]
    serialised: tuple[int, ...]  # addresses of warpgroup MMAs that run one by one
    loops: tuple[MainLoop, ...]  # the steady one first
    beside: tuple[MainLoop, ...]  # of warps that share its steps without exponentials
    warnings: tuple[str, ...]
    program: Program

    @property
    def steady(self) -> MainLoop | None:
        """The main loop where a long sequence spends its time; None without one."""
        return self.loops[0] if self.loops else None

    @property
    def slots_per_exponential(self) -> float:
        """Issue slots of a steady step on its straight way, of all warps that share it."""
        return self._slots([x.straight for x in (self.steady, *self.beside)])

    @property
    def slots_with_all(self) -> float:
        """The same with what that way may leave out, or leaves the loop for."""
        return self._slots([(x.around or x).all for x in (self.steady, *self.beside)])

    @staticmethod
    def _slots(mixes: list[Mix]) -> float:
        return sum(mix.slots for mix in mixes) / mixes[0].exponentials

    def as_dict(self) -> dict:
        """For JSON: all but the code itself."""
        fields = asdict(self)
        del fields["program"]
        for loop in (*fields["loops"], *fields["beside"]):
            _finish(loop)
        return fields

    def __str__(self) -> str:
        return "\n".join([*_resource_lines(self), *_loop_lines(self), *_warning_lines(self)])


def _finish(loop: dict) -> None:
    """A loop for JSON: without its path, with what is derived."""
    del loop["path"]
    for name in ("straight", "all"):
        count = loop[name]["exponentials"]
        loop[name]["per_exponential"] = loop[name]["slots"] / count if count else None
    if loop["around"]:
        _finish(loop["around"])


def analyse(cubin: bytes, kernel: str | None = None) -> Report:
    """The report on `kernel`, or on the only one with matrix products, or on the only one there is.

    Raises ValueError for an image that is no cubin for one of SMS or leaves the choice open, and
    sass.DisassemblerMissing where nvdisasm is not installed.
    """
    image = Cubin.parse(cubin)
    if image.sm not in SMS:
        known = ", ".join(f"sm_{sm}" for sm in SMS)
        raise ValueError(f"the cubin is for sm_{image.sm}, this reads {known}")
    programs = sass.load(cubin)
    if kernel is not None:
        chosen = [p for p in programs if p.name == kernel]
    else:
        chosen = [p for p in programs if any(x.is_mma for x in p.code)] or list(programs)
    if len(chosen) != 1:
        names = [p.name for p in programs]
        raise ValueError(f"kernel={kernel!r} leaves {len(chosen)} of the cubin's kernels: {names}")
    return _report(image, chosen[0])


def analyse_rest(cubin: bytes, chosen: Report) -> tuple[Report, ...]:
    """The cubin's other kernels, in its order."""
    image, name = Cubin.parse(cubin), chosen.resources.name
    return tuple(_report(image, p) for p in sass.load(cubin) if p.name != name)


def _report(image: Cubin, program: Program) -> Report:
    flow = Flow(program)
    loops = main_loops(flow)
    changes = hazards.register_changes(flow)
    return Report(
        resources=resources.read(image, program.name),
        instructions=len(program.code),
        mmas=sum(x.is_mma for x in program.code),
        local=Local.of(program.code),
        register_changes=changes,
        serialised=hazards.serialised(program.code),
        loops=loops,
        beside=loops_beside(flow) if loops else (),
        warnings=hazards.warnings(flow, loops[0] if loops else None, changes),
        program=program,
    )


def _resource_lines(report: Report) -> list[str]:
    r, local = report.resources, report.local
    changes = ", ".join(
        f"{change.role} {'takes' if change.grows else 'gives back to'} {change.registers}"
        for change in report.register_changes
    )
    return [
        f"kernel            {r.name}",
        f"threads           {r.threads or 'not fixed'}",
        f"registers         {r.registers} at launch; {changes or 'no setmaxnreg'}",
        f"spills            {local.spill_store_bytes} bytes stored, "
        f"{local.spill_load_bytes} bytes loaded",
        f"local memory      {r.frame} bytes per thread, {local.loads} loads, {local.stores} stores",
        f"static smem       {r.static_smem} bytes",
        f"named barriers    {r.named_barriers}",
        f"code              {r.code} bytes, {report.instructions} instructions, {report.mmas} MMAs",
    ]


def _loop_lines(report: Report) -> list[str]:
    if not report.loops:
        return ["main loop         none: no loop holds both matrix products and exponentials"]
    lines = []
    code = report.program.code
    names = ["steady loop", *["other loop"] * (len(report.loops) - 1)]
    names += ["loop beside"] * len(report.beside)
    for name, loop in zip(names, (*report.loops, *report.beside), strict=True):
        shapes = ", ".join(f"{count} of {shape}" for shape, count in loop.all.mma_shapes.items())
        lines += [
            f"{name:17} {code[loop.head].address:#06x} to {code[loop.latch].address:#06x}",
            f"  MMAs            {shapes}",
            f"  straight way    {_mix(loop.straight)}",
            f"  all             {_mix(loop.all)}",
        ]
        lines += _skipped_lines(loop)
        if loop.around:
            lines.append(f"  with rare code  {_mix(loop.around.all)}")
            lines.append(f"{'':18}(the loop around it: runs when a branch leaves the inner one)")
    if report.beside:
        lines.append(
            f"of both           {report.slots_per_exponential:.2f} issue slots per exponential: "
            "a step of the steady loop and what other warps do beside it"
        )
    return lines


def _skipped_lines(loop: MainLoop) -> list[str]:
    """A line for each block worth one, and one for the small change: repeated waits, mostly."""
    large = [part for part in loop.skipped if part.mix.slots > SMALL]
    small = [part for part in loop.skipped if part.mix.slots <= SMALL]
    lines = [
        f"  may be skipped  {part.first:#06x} to {part.last:#06x}, {part.mix.slots} slots"
        f"{' out of line' if part.out_of_line else ''} ({part.mix})"
        for part in large
    ]
    if small:
        slots = sum(part.mix.slots for part in small)
        lines.append(
            f"  may be skipped  {len(small)} blocks of {SMALL} slots or fewer, {slots} in all"
        )
    return lines


def _mix(mix: Mix) -> str:
    if not mix.exponentials:
        return f"{mix.slots} slots, no exponentials ({mix})"
    return (
        f"{mix.per_exponential:.2f} issue slots per exponential: {mix.slots} slots, "
        f"{mix.exponentials} exponentials ({mix})"
    )


def _warning_lines(report: Report) -> list[str]:
    return [f"warning: {text}" for text in report.warnings]
