"""Divergence: which lanes of a warpgroup run next, and how they split and meet again.

A fragment is a set of lanes that share a pc.  A warpgroup starts as one fragment.  The runnable
fragment with the lowest pc goes first, and fragments that meet at a pc merge.  Blocked ones are
skipped, or spin loops would hang, and one that runs on and on makes way for the others now and
then, as they may be what it polls for.  A `.sync.aligned` instruction holds a fragment until the
whole warp (for wgmma: warpgroup) has arrived, which copes with an elected lane blocking alone.

A segment is a generated function (w, fr) -> next pc, or -1 when the fragment was blocked, split
or has left.  branch, split, guard, leave and pause are called by such functions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Race

RUNNING, WAITING, CONVERGING, AT_BARRIER = range(4)
FAR = 1 << 30
TURN = 5_000  # segments that a warpgroup runs at most before others get theirs
_NEVER = bool  # bool() is False


class Fragment:
    __slots__ = (
        "pc",
        "mask",
        "state",
        "ready",
        "why",
        "timed_out",
        "barrier_pc",
        "moment",
        "spent",
    )

    def __init__(self, pc: int, mask: np.ndarray, moment=None):
        """moment: when it is, if the launch is profiled (profiling/clock.py)."""
        self.pc, self.mask = pc, mask
        self.state = RUNNING
        self.ready: Callable[[], bool] = _NEVER
        self.why: Callable[[], str] = str
        self.timed_out = False
        self.barrier_pc = pc
        self.spent = False  # has had its turn
        self.moment = moment

    def part(self, pc: int, mask: np.ndarray) -> Fragment:
        """Some of its lanes, which go on at pc; the caller takes them out of its mask."""
        return Fragment(pc, mask, self.moment and self.moment.copy())

    def wait_until(self, ready: Callable[[], bool], why: Callable[[], str]) -> None:
        """Suspend until ready() or until nothing else in the cluster can move."""
        self.state, self.timed_out = WAITING, False
        self.ready, self.why = ready, why

    def sleep(self) -> None:
        """Suspend until nothing else can move."""
        self.wait_until(_NEVER, lambda: "pausing")

    def hold_at_barrier(self, pc: int, after: int, why: Callable[[], str]) -> None:
        """Suspend at the barrier instruction at pc until it is released, then go on after it."""
        self.state, self.why = AT_BARRIER, why
        self.pc, self.barrier_pc = after, pc

    @property
    def site(self) -> int:
        """pc of the instruction that a blocked fragment is in."""
        return self.barrier_pc if self.state == AT_BARRIER else self.pc

    def awake(self) -> bool:
        """Whether a waiting fragment may go on; makes it run again if so."""
        if self.timed_out or self.ready():
            self.state = RUNNING
            return True
        return False

    def describe(self) -> str:
        return {RUNNING: "running", CONVERGING: "waiting for the rest of its warp(s)"}.get(
            self.state
        ) or self.why()


def _next(fragments: list[Fragment]) -> Fragment | None:
    """The runnable fragment with the lowest pc, of those that have not had their turn."""
    chosen = None
    for f in fragments:
        if f.state == WAITING and not f.awake():
            continue
        if f.state == RUNNING and (chosen is None or (f.spent, f.pc) < (chosen.spent, chosen.pc)):
            chosen = f
    if chosen is not None and chosen.spent:
        for f in fragments:
            f.spent = False
    return chosen


def merge(fragments: list[Fragment], into: Fragment) -> int:
    """Join fragments at the same pc; returns the pc of the next one ahead."""
    ahead = FAR
    for f in list(fragments):
        if f is into or f.state not in (RUNNING, CONVERGING):
            continue
        if f.pc == into.pc:
            into.mask = into.mask | f.mask
            if f.moment is not None:
                into.moment.join(f.moment)
            fragments.remove(f)
        elif into.pc < f.pc < ahead:
            ahead = f.pc
    return ahead


def run(w, budget: int = TURN) -> bool:
    """Run a warpgroup until every fragment is blocked; True if anything executed."""
    ran = False
    while (fr := _next(w.fragments)) is not None:
        ahead = merge(w.fragments, fr) if len(w.fragments) > 1 else FAR
        ran = True
        budget = run_fragment(w, fr, ahead, budget)
        if budget <= 0:
            fr.spent = True
            return True
    return ran


def run_fragment(w, fr: Fragment, ahead: int, budget: int) -> int:
    """Run one fragment until it is blocked or reaches pc `ahead`; returns the budget left."""
    whole = fr.mask.tobytes() == w.ones
    lowered = w.launch.lowered
    segments = lowered.whole if whole else lowered.masked
    registers, profile = w.registers, w.profile
    w.current = fr
    pc = fr.pc
    while True:
        if not whole and (kind := lowered.converges(pc)) and not _converged(w, fr, pc, kind):
            return budget
        segment = segments.get(pc) or lowered.build(pc, whole)
        if registers is not None and segment.operands:
            registers.run(segment, lowered)
        if profile is not None:
            profile.ran(w, fr, pc, segment.length)
        w.instructions += segment.length
        w.segments += 1
        after = segment.run(w, fr)
        if after < 0:
            return budget
        fr.pc = pc = after
        budget -= 1
        if pc >= ahead or budget <= 0:
            return budget


def _converged(w, fr: Fragment, pc: int, kind: str) -> bool:
    """Hold back the warps of a fragment that are not complete; True if it may go on at once."""
    fr.pc = pc
    fragments = len(w.fragments)
    merge(w.fragments, fr)
    if len(w.fragments) < fragments:
        return False  # perhaps complete now: it starts again from here
    if kind == "warpgroup":
        if (fr.mask == w.live).all():
            return True
        fr.state = CONVERGING
        return False
    lanes = fr.mask.reshape(-1, 32)
    partial = lanes.any(1) & (lanes != w.live.reshape(-1, 32)).any(1)
    if not partial.any():
        return True
    held = np.repeat(partial, 32) & fr.mask
    rest = fr.mask & ~held
    if not rest.any():
        fr.state = CONVERGING
        return False
    # Whole warps go on at once: if they started again from here they would meet the others first.
    waiting = fr.part(pc, held)
    waiting.state = CONVERGING
    w.fragments.append(waiting)
    fr.mask = rest
    return True


def split(w, fr, predicate, then, otherwise):
    """Lanes with the predicate go to pc `then`, the others to `otherwise`."""
    taken = fr.mask & predicate
    w.fragments.append(fr.part(otherwise, fr.mask & ~predicate))
    fr.mask, fr.pc = taken, then
    return -1


def branch(w, fr, predicate, then, otherwise):
    """split() unless all lanes agree."""
    taken = fr.mask & predicate
    if not taken.any():
        return otherwise
    if taken.tobytes() == fr.mask.tobytes():
        return then
    return split(w, fr, predicate, then, otherwise)


def guard(w, fr, predicate, negated, pc, after):
    """Before a predicated terminator at pc: lanes that do not execute it skip to `after`.

    Returns None if the terminator is to be executed now.
    """
    taking = fr.mask & (~predicate if negated else predicate)
    if not taking.any():
        return after
    if (taking == fr.mask).all():
        return None
    w.fragments.append(fr.part(after, fr.mask & ~taking))
    fr.mask, fr.pc = taking, pc
    return -1


def leave(w, fr):
    """ret and exit.  Outstanding bulk stores are executed, not waited for."""
    for lane in w.lane_list(fr.mask) if w.groups_kept else ():
        w.bulk.commit(lane)
        operations = w.bulk.drain(lane, 0)
        if operations and w.races is not None:
            _, low, high, _ = operations[0].spans[0]
            raise Race(
                f"thread {w.first_thread + lane} exits while its bulk store may still read shared "
                f"memory {low:#x}..{high - 1:#x}: no cp.async.bulk.wait_group since "
                f"{w.launch.lowered.place(operations[0].site)}"
            )
    w.live = w.live & ~fr.mask
    w.fragments.remove(fr)
    w.cta.lanes_left(int(fr.mask.sum()))
    for f in w.fragments:  # a warp may be complete now
        if f.state == CONVERGING:
            f.state = RUNNING
    return -1


def pause(w, fr, after):
    """nanosleep: let others run."""
    fr.pc = after
    fr.sleep()
    return -1
