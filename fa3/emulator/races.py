"""Check "race": accesses to shared memory that nothing orders, by vector clocks (clocks.py).

A race is found in whatever order the emulator happened to run, as long as both accesses were
executed.  (Flanagan and Freund: FastTrack, PLDI 2009.)
"""

from __future__ import annotations

import numpy as np

from .checks import bytes_of
from .clocks import AGENT, PC, Access, Clocks, all_known, unknown
from .errors import MissingProxyFence, Race
from .fences import UnfencedWrites
from .lanes import LaneRaces, LaneShadow

_WAITS = {  # kind of operation -> what would have ordered it
    "load": "no wait on its mbarrier",
    "store": "no cp.async.bulk.wait_group of its thread",
    "wgmma": "no wgmma.wait_group of its warps",
    "cp.async": "no cp.async.wait_group of its warp",
}


class Races(Clocks):
    """Of one cluster."""

    def __init__(self, cluster):
        super().__init__(cluster)
        self._kernel = cluster.launch.kernel
        self._lanes = LaneRaces(self._count, self._name, self._place)
        self._unfenced = UnfencedWrites() if cluster.launch.checks.proxy else None

    def _lanes_met(self, agent: int) -> None:
        self._lanes.meet(agent)

    def generic(self, memory, addresses, nbytes: int, threads, writes: bool, each=None) -> None:
        """Accesses of nbytes at addresses by threads (arrays of one shape), now.

        each: the threads of the words of each address, where those differ.
        """
        addresses, threads = np.ravel(addresses), np.ravel(threads)
        for agent, mine, access in self.by_warp(threads):
            words = self._words(addresses[mine], nbytes)
            (self.write if writes else self.read)(memory.shadow, words, access)
            if writes and self._unfenced is not None:
                memory.shadow.fenced[words] = 0
                own = np.repeat(threads[mine], max(1, nbytes // 4))
                self._unfenced.add(agent, memory.shadow, words, own)
        words, lanes = self._words(addresses, nbytes), memory.shadow.lanes
        if nbytes < 4:
            return lanes.forget(words)
        by = np.repeat(threads, nbytes // 4) if each is None else np.ravel(each)
        self._lanes.access(lanes, words, self._of_threads(by), by % 32, access.epoch & PC, writes)

    def fence(self, w, m) -> None:
        """fence.proxy.async"""
        if self._unfenced is None:
            return
        threads = w.threads if m is None else w.threads[m]
        agents = self._of_threads(threads)
        for agent in self.agents(w, w.live if m is None else m):
            own = threads[agents == agent]
            self._unfenced.fence(agent, own, self.fenced(agent, own))

    def atomic(self, memory, addresses, nbytes: int, threads) -> None:
        """Atomic accesses: ordered among each other, and they pass clocks on."""
        agents = self._of_threads(threads)
        for agent in np.unique(agents).tolist():
            self.acquire([agent], memory.shadow.atomics)
            words = self._words(addresses[agents == agent], nbytes)
            self.write(memory.shadow, words, self._of_warp(agent))
            memory.shadow.atomics = self.release([agent])

    @staticmethod
    def _words(addresses, nbytes: int) -> np.ndarray:
        words = addresses >> 2
        return words if nbytes <= 4 else (words[:, None] + np.arange(nbytes // 4)).ravel()

    def read(self, shadow, words, access: Access) -> None:
        self._require(shadow, shadow.writes, words, access, "reads")
        asynchronous = access.epoch >> AGENT >= self._count
        if asynchronous and self._unfenced is not None and shadow.fenced is not None:
            self._require_fences(shadow.fenced[words], words, access)
        for layer in shadow.reads:
            if all_known(layer[words], access.clock):
                layer[words] = access.epoch
                return
            words = _listed(words)
            known = ~unknown(layer[words], access.clock)
            layer[words[known]] = access.epoch
            words = words[~known]
        shadow.reads.append(np.zeros_like(shadow.writes))
        shadow.reads[-1][words] = access.epoch

    def write(self, shadow, words, access: Access, suspects=None) -> None:
        """suspects: those of the words that must not race, default all."""
        suspects = words if suspects is None else suspects
        self._require(shadow, shadow.writes, suspects, access, "writes")
        for layer in shadow.reads:
            self._require(shadow, layer, suspects, access, "writes")
            layer[words] = 0
        shadow.writes[words] = access.epoch

    def use_mbarrier(self, memory, address: int, agent: int) -> None:
        """An arrival or a wait: the barrier must have been initialised before it."""
        shadow, word = memory.shadow, address >> 2
        if unknown(shadow.writes[word], self.clocks[agent]):
            access, words = self._of_warp(agent), np.array([word])
            self._require(shadow, shadow.writes, words, access, "uses the mbarrier in")

    def span_write(self, memory, start: int, end: int, access: Access) -> None:
        if end <= memory.size:  # otherwise the operation itself will complain
            self.write(memory.shadow, slice(start >> 2, end + 3 >> 2), access)

    def span_read(self, memory, start: int, end: int, access: Access) -> None:
        if end <= memory.size:
            self.read(memory.shadow, slice(start >> 2, end + 3 >> 2), access)

    def _require(self, shadow, cells, words, access: Access, does: str) -> None:
        """Raise Race unless an access is ordered after those in the cells of its words."""
        epochs = cells[words]
        if all_known(epochs, access.clock):
            return
        words, first = _listed(words), int(unknown(epochs, access.clock).argmax())
        epoch = int(epochs[first])
        place = shadow.named(int(words[first]), words[epochs == epoch])
        before = "write" if cells is shadow.writes else "read"
        agent = epoch >> AGENT
        missing = "no barrier leads from there to here"
        if agent >= self._count:
            missing = f"{_WAITS[self._names[agent][0]]}, or no barrier after it, leads to here"
        raise Race(
            f"{access.who} {does} {place} unordered with the "
            f"{before} by {self._name(agent)} at {self._place(epoch & PC)}: {missing}"
        )

    def _require_fences(self, epochs, words, access: Access) -> None:
        """The async proxy reads: it must know of the fences after generic writes."""
        if not all_known(epochs, access.clock):
            words, first = _listed(words), int(unknown(epochs, access.clock).argmax())
            epoch = int(epochs[first])
            place = bytes_of(int(words[first]), words[epochs == epoch])
            raise MissingProxyFence(
                f"{access.who} reads shared memory at {place}, written through "
                f"the generic proxy by {self._name((epoch >> AGENT) - self._fences)}, whose "
                f"fence.proxy.async at {self._place(epoch & PC)} nothing orders before it: no "
                "barrier leads from there to here"
            )

    def _place(self, pc: int) -> str:
        from .execution.report import place

        return place(self._kernel.code[pc] if pc < len(self._kernel.code) else None)


def _listed(words) -> np.ndarray:
    return np.arange(words.start, words.stop) if isinstance(words, slice) else words


class Shadow:
    """The last write of each 4-byte word of a shared memory, and the reads since."""

    def __init__(self, nbytes: int):
        self.writes = np.zeros(nbytes // 4, np.int64)
        self.lanes = LaneShadow(nbytes)
        self.reads: list[np.ndarray] = []  # a word's unordered reads lie in different layers
        self.fenced = np.zeros(nbytes // 4, np.int64)  # epoch of the fence after a generic write
        self.atomics: np.ndarray | None = None  # what atomics pass on

    @staticmethod
    def named(first: int, others) -> str:
        """A word and those of others that follow it."""
        return f"shared memory {bytes_of(first, others)}"
