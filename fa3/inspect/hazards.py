"""What ruins a warpgroup kernel quietly: serialised matrix products, spills, registers not moved.

Serialised: when ptxas cannot prove that nothing touches an accumulator in flight, it commits every
matrix product by itself and waits for it at once (HGMMA with gsb0, then WARPGROUP.DEPBAR.LE gsb0,
0x0). A kernel written well commits a chain of them and waits once, so a matrix product that is
alone between two full waits is the sign.
"""

from dataclasses import dataclass

from .flow import Flow
from .loops import MainLoop
from .sass import Instruction, Program


@dataclass(frozen=True)
class Local:
    """Local memory in the code; bytes per thread, each instruction counted once as ptxas does."""

    loads: int
    stores: int
    spill_load_bytes: int
    spill_store_bytes: int

    @classmethod
    def of(cls, code: tuple[Instruction, ...]) -> "Local":
        loads = [x for x in code if x.base == "LDL"]
        stores = [x for x in code if x.base == "STL"]
        return cls(
            loads=len(loads),
            stores=len(stores),
            spill_load_bytes=sum(x.bytes for x in loads if x.is_spill),
            spill_store_bytes=sum(x.bytes for x in stores if x.is_spill),
        )


@dataclass(frozen=True)
class RegisterChange:
    """One setmaxnreg that survived compilation."""

    address: int
    role: str  # "consumer": matrix products follow; "producer": TMA loads follow; or "other"
    grows: bool  # takes registers from the CTA's pool, or gives them back
    registers: int  # per thread from here on


def register_changes(flow: Flow) -> tuple[RegisterChange, ...]:
    code, changes = flow.program.code, []
    for i in flow.order:
        for position in flow.blocks[i].positions:
            x = code[position]
            if x.base == "USETMAXREG":
                changes.append(
                    RegisterChange(
                        address=x.address,
                        role=_role(flow, i),
                        grows="ALLOC" in x.opcode.replace("DEALLOC", ""),
                        registers=int(x.operands.split(",")[-1], 0),
                    )
                )
    return tuple(sorted(changes, key=lambda change: change.address))


def _role(flow: Flow, block: int) -> str:
    """From what only this block leads to."""
    bases = {
        flow.program.code[position].base
        for i in flow.order
        if flow.dominates(block, i)
        for position in flow.blocks[i].positions
    }
    if bases & {"HGMMA", "QGMMA", "IGMMA"}:
        return "consumer"
    return "producer" if bases & {"UTMALDG", "LDGSTS"} else "other"


def is_full_wait(instruction: Instruction) -> bool:
    """Waits until no matrix product is in flight."""
    return (
        instruction.opcode.startswith("WARPGROUP.DEPBAR")
        and int(instruction.operands.split(",")[-1], 0) == 0
    )


def serialised(code: tuple[Instruction, ...]) -> tuple[int, ...]:
    """Addresses of the matrix products that run alone, in code of one straight run."""
    alone, since_wait = [], []
    for x in code:
        if x.is_wgmma:
            since_wait.append(x)
        elif is_full_wait(x):
            if len(since_wait) == 1:
                alone.append(since_wait[0].address)
            since_wait = []
    return tuple(alone)


def warnings(
    flow: Flow, steady: MainLoop | None, changes: tuple[RegisterChange, ...]
) -> tuple[str, ...]:
    """Sentences, most costly first; none for a kernel as it should be."""
    program = flow.program
    found = []
    alone = serialised(program.code)
    if alone:
        inside = ""
        if steady:
            body = serialised(tuple(program.code[i] for i in steady.path))
            inside = f", {len(body)} of them in the steady loop"
        found.append(
            f"{len(alone)} serialised warpgroup MMAs{inside}: a full wait follows each, "
            f"the first at {alone[0]:#x}"
        )
    local = Local.of(program.code)
    if local.loads or local.stores:
        inside = 0
        if steady:
            inside = sum(x.base in ("LDL", "STL") for x in _body(program, steady))
        found.append(
            f"local memory: {local.loads} loads and {local.stores} stores, "
            f"{inside} of them in the steady loop "
            f"(spills {local.spill_store_bytes} bytes out, {local.spill_load_bytes} bytes in)"
        )
    if any(x.is_wgmma for x in program.code):
        found += _register_warnings(flow, changes)
    return tuple(found)


def _body(program: Program, loop: MainLoop) -> tuple[Instruction, ...]:
    return program.code[loop.head : loop.latch + 1]


def _register_warnings(flow: Flow, changes: tuple[RegisterChange, ...]) -> list[str]:
    """A role without its setmaxnreg: ptxas drops all of them when registers are not fixed."""
    found = []
    loads = any(x.base in ("UTMALDG", "LDGSTS") for x in flow.program.code)
    if not any(change.role == "consumer" and change.grows for change in changes):
        found.append("no USETMAXREG in the consumer role: it keeps the registers of the launch")
    if loads and not any(change.role == "producer" and not change.grows for change in changes):
        found.append("no USETMAXREG in the producer role: it keeps the registers of the launch")
    return found
