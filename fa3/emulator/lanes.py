"""Check "race", inside a warp: lanes that use a word of shared memory one after another, one of
them writing it, with no bar.warp.sync in between.

Lanes run in step here, so this never shows in results; on hardware each goes its own way.
Told from a stamp for each word: who used it last, where, and in which round of its warp; a new
round begins when the lanes meet.  Accesses of less than a word are not followed.
"""

from __future__ import annotations

import numpy as np

from .errors import Race

_WARP, _ROUND, _PC = 50, 30, 6  # lowest bits of a stamp's fields; below those, a lane + 1
_SEVERAL = 33  # lanes
_LANE, _PCS, _ROUNDS = (1 << _PC) - 1, (1 << 24) - 1, (1 << 20) - 1


class LaneShadow:
    """Stamps of the last write and read of each 4-byte word of a shared memory."""

    def __init__(self, nbytes: int):
        self.writes = np.zeros(nbytes // 4, np.int64)
        self.reads = np.zeros(nbytes // 4, np.int64)

    def forget(self, words) -> None:
        self.writes[words] = self.reads[words] = 0


class LaneRaces:
    """Of the warps of one cluster; name(warp) and place(pc) are for messages."""

    def __init__(self, warps: int, name, place):
        self._name, self._place = name, place
        self._rounds = np.ones(warps, np.int64)  # so that no stamp is 0

    def meet(self, warp: int) -> None:
        """What the lanes of a warp did so far is known to all of them."""
        self._rounds[warp] += 1

    def access(self, shadow: LaneShadow, words, warps, lanes, pc: int, writes: bool) -> None:
        """Lanes of warps (arrays of the shape of words) access words."""
        now, mine = warps << _WARP - _ROUND | self._rounds[warps] & _ROUNDS, lanes + 1
        read, written = shadow.reads[words], shadow.writes[words]
        other = written & _LANE
        after = (written >> _ROUND == now) & (other != mine) & (other != _SEVERAL)
        if after.any():
            does = "writes" if writes else "reads"
            self._report(after, written, words, warps, lanes, does, "wrote")
        after = (read >> _ROUND == now) & (read & _LANE != mine)
        if writes and after.any():
            self._report(after, read, words, warps, lanes, "writes", "read")
        stamps = now << _ROUND | pc << _PC
        table = shadow.writes if writes else shadow.reads
        table[words] = stamps | mine
        several = table[words] != stamps | mine  # lanes of this instruction
        if not writes:
            several |= after
        if several.any():
            table[words[several]] = stamps[several] | _SEVERAL

    def _report(self, bad, stamps, words, warps, lanes, does: str, did: str) -> None:
        stamp, word, warp, lane = (int(x[bad][0]) for x in (stamps, words, warps, lanes))
        other = stamp & _LANE
        who = "several lanes" if other == _SEVERAL else f"lane {other - 1}"
        raise Race(
            f"lane {lane} of {self._name(warp)} {does} shared memory {word * 4:#x} that {who} of "
            f"it {did} at {self._place(stamp >> _PC & _PCS)}: no bar.warp.sync in between"
        )
