"""Checks "wgmma" and "fence": what a warpgroup's wgmmas and its other instructions do to registers.

wgmma.mma_async uses its registers until a wait_group covers it (check "wgmma").  And it must come
after a wgmma.fence that follows every other access to its registers, A fragments and accumulators
alike; only accumulators of wgmmas of one shape may go from one to the next without (check "fence").
"""

from __future__ import annotations

from .errors import MissingWgmmaFence, RegisterInFlight


class WgmmaRegisters:
    """32-bit registers that wgmmas of one warpgroup write or read."""

    def __init__(self, checks):
        self._flight, self._fences = checks.wgmma, checks.fence
        self.accumulators: list[frozenset] = []  # of unfinished wgmmas, by commit group
        self.operands: list[frozenset] = []
        self._issued: list[tuple[frozenset, int | None]] = []  # registers, pc; the latest last
        self._open: set[int] = set()
        self._open_operands: set[int] = set()
        # since the last wgmma.fence
        self._fenced = False
        self._touched: dict[int, object] = {}  # segments that ran, by identity, the latest last
        self._shapes: dict[frozenset, tuple] = {}  # accumulator -> shape of the wgmma

    @property
    def busy(self) -> bool:
        return bool(self._flight and (self.accumulators or self._open))

    def issue(
        self,
        accumulator: frozenset,
        operand: frozenset,
        shape: tuple,
        lowered=None,
        site: int | None = None,
    ) -> None:
        """A wgmma is issued; shape: what wgmmas must share to follow each other without a fence."""
        if self._fences:
            self._require_fence(accumulator, operand, shape, lowered)
        if not self._flight:
            return
        if busy := _shared(operand, self._open, *self.accumulators):
            raise RegisterInFlight(
                f"{_named(busy, lowered)} is the accumulator of a wgmma in flight and an A operand "
                f"of this one (no wait_group since {self._issuer(busy, lowered)})"
            )
        if busy := _shared(accumulator, self._open_operands, *self.operands):
            raise RegisterInFlight(
                f"{_named(busy, lowered)} is an A operand of a wgmma in flight and the accumulator "
                f"of this one (no wait_group since {self._issuer(busy, lowered)})"
            )
        self._open |= accumulator
        self._open_operands |= operand
        self._issued.append((accumulator | operand, site))

    def commit(self) -> None:
        self.accumulators.append(frozenset(self._open))
        self.operands.append(frozenset(self._open_operands))
        self._open, self._open_operands = set(), set()

    def wait(self, keep: int) -> None:
        del self.accumulators[: max(0, len(self.accumulators) - keep)]
        del self.operands[: max(0, len(self.operands) - keep)]
        if not self.accumulators and not self._open:
            self._issued.clear()

    def fence(self) -> None:
        self._fenced = True
        self._touched.clear()
        self._shapes.clear()

    def conflict(self, touched: frozenset, written: frozenset) -> tuple[str, set]:
        """("accumulator" or "A operand" or "", registers misused) by one instruction or several."""
        if busy := _shared(touched, self._open, *self.accumulators):
            return "accumulator", busy
        if busy := _shared(written, self._open_operands, *self.operands):
            return "A operand", busy
        return "", set()

    def run(self, segment, lowered) -> None:
        """A segment without wgmmas that uses registers of theirs is about to be executed."""
        if self.busy and self.conflict(segment.touched, segment.written)[0]:
            self._report(segment, lowered)
        if self._fences:
            self._touched.pop(id(segment), None)
            self._touched[id(segment)] = segment

    def _report(self, segment, lowered) -> None:
        for pc, touched, written in segment.registers():
            what, busy = self.conflict(touched, written)
            if busy:
                error = RegisterInFlight(
                    f"{what} {_named(busy, lowered)} "
                    f"{'used' if what == 'accumulator' else 'overwritten'} while its wgmma is "
                    f"still in flight (no wait_group since {self._issuer(busy, lowered)})"
                )
                error.site = pc
                raise error

    def _issuer(self, registers: set, lowered) -> str:
        """Where the last wgmma that uses one of these registers was issued."""
        sites = (site for used, site in reversed(self._issued) if not used.isdisjoint(registers))
        site = next(sites, None)
        return "it was issued" if site is None else lowered.place(site)

    def _require_fence(self, accumulator, operand, shape, lowered) -> None:
        if not self._fenced:
            raise MissingWgmmaFence("the first wgmma of a warpgroup has no wgmma.fence before it")
        for segment in reversed(self._touched.values()):
            if used := _shared(segment.operands, accumulator, operand):
                self._report_touched(segment, used, lowered)
        if self._shapes.get(accumulator) == shape:
            return
        for other, its_shape in self._shapes.items():
            if its_shape != shape and (shared := other & accumulator):
                raise MissingWgmmaFence(
                    f"accumulator {_named(shared, lowered)} of a wgmma of another shape, with no "
                    "wgmma.fence in between"
                )
        self._shapes[accumulator] = shape

    @staticmethod
    def _report_touched(segment, used: set, lowered) -> None:
        for pc, touched, _ in reversed(segment.instructions):
            if shared := touched & used:
                raise MissingWgmmaFence(
                    f"{_named(shared, lowered)} of this wgmma was last used at "
                    f"{lowered.place(pc)}, with no wgmma.fence since"
                )


def _shared(registers: frozenset, *others) -> set:
    """Those that are in one of the others."""
    return set().union(*(registers & x for x in others if not registers.isdisjoint(x)))


def _named(registers, lowered) -> str:
    """ "register %r1 (and 3 more)" """
    if lowered is None:
        return f"registers {sorted(registers)}"
    regs = lowered.kernel.regs
    names = sorted(n for n, (cls, i) in regs.items() if cls == "w" and i in registers)
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"register {names[0]}{more}"
