"""Profile: what a person asks for, and what a launch leaves in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import drawing, table, trace
from .counters import Counters, Tally, by_role, total
from .drawing import View
from .observer import Observer, Recording
from .timeline import Event

Dim3 = tuple[int, int, int]


@dataclass
class LaunchProfile:
    """One launch."""

    kernel: str
    grid: Dim3
    block: Dim3
    warps: list[Counters] = field(repr=False)  # of each warp of a CTA, over all CTAs
    events: list[Event] = field(repr=False)
    conflicts: dict[str, int]  # wavefronts beyond the fewest, by place in the kernel's source
    cycles: float  # nominal, of the CTA that takes longest
    longest_chain: int
    """Of hand-overs: waits for what another warp or a copy did, each after the one before."""
    critical_path: dict[str, float]
    """Cycles of `cycles` by what kept the last warp from finishing earlier."""

    @property
    def counters(self) -> dict[str, Counters]:
        """By role (counters.ROLES)."""
        return by_role(self.warps)

    @property
    def total(self) -> Counters:
        return total(self.warps)

    def write_trace(self, path: Path | str, labels: Mapping[str, str] | None = None) -> None:
        """A Chrome trace (JSON), which https://ui.perfetto.dev shows.

        labels: other names of events, for those that a person knows.
        """
        trace.write(self, path, labels or {})

    def write_png(self, path: Path | str, **view) -> None:
        """A picture of one CTA; view: fields of drawing.View.

        Raises SetupError without matplotlib, ValueError for a CTA that did not run.
        """
        drawing.write(self, path, View(**view))

    def __str__(self) -> str:
        return "\n".join(table.lines(self))

    def as_dict(self) -> dict:
        """For JSON, without the events."""
        return {
            "kernel": self.kernel,
            "grid": self.grid,
            "block": self.block,
            "cycles": self.cycles,
            "longest_chain": self.longest_chain,
            "critical_path": self.critical_path,
            "conflicts": self.conflicts,
            "counters": {role: x.as_dict() for role, x in self.counters.items()},
        }


@dataclass(eq=False)
class Profile:
    """Counters and timelines of launches; see options(profile=...) and emulator.profile()."""

    launches: list[LaunchProfile] = field(default_factory=list)

    def write_trace(self, path: Path | str, labels: Mapping[str, str] | None = None) -> None:
        """Of the last launch, see LaunchProfile."""
        self._last().write_trace(path, labels)

    def write_png(self, path: Path | str, **view) -> None:
        """Of the last launch, see LaunchProfile."""
        self._last().write_png(path, **view)

    def _last(self) -> LaunchProfile:
        if not self.launches:
            raise ValueError("the profile has no launch yet")
        return self.launches[-1]

    def start(self, launch) -> Running:
        return Running(self, launch)


class Running:
    """The profile of a launch while it runs."""

    def __init__(self, profile: Profile, launch):
        warps = 4 * -(-launch.threads // 128)
        self._profile, self._launch = profile, launch
        self._recording = Recording(launch.kernel, Tally(warps))

    def observer(self, ctas: int) -> Observer:
        """Of a cluster that is about to run."""
        return Observer(self._recording, ctas)

    def finish(self) -> None:
        recording, launch = self._recording, self._launch
        warps = recording.tally.finish(recording.stretches, recording.lanes)
        self._profile.launches.append(
            LaunchProfile(
                launch.kernel.name,
                launch.grid,
                launch.block,
                warps[: -(-launch.threads // 32)],
                recording.timeline.events,
                self._conflicts(),
                recording.last.end,
                recording.depth,
                recording.last.shares(),
            )
        )

    def _conflicts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for pc, n in self._recording.conflicts.items():
            instr = self._launch.kernel.code[pc]
            place = str(instr.loc or f"PTX line {instr.line}")
            found[place] = found.get(place, 0) + n
        return found
