"""A CTA: its warpgroups, shared memory and named barriers."""

from __future__ import annotations

from ..memory.shared import SharedMemory
from .register_file import RegisterFile
from .sync import NamedBarriers
from .warpgroup import LANES, Warpgroup


class CTA:
    def __init__(self, cluster, rank: int, position: tuple[int, int, int], number: int):
        """rank in the cluster; position and (linear) number in the grid."""
        launch = cluster.launch
        self.cluster, self.rank, self.position, self.number = cluster, rank, position, number
        self.smem = SharedMemory(launch.smem_bytes, launch.checks, cluster.proxy, cluster.races)
        self.barriers = NamedBarriers(cluster.races)
        self.live = launch.threads
        self.registers = RegisterFile(launch.threads)
        self.warpgroups = [Warpgroup(self, i) for i in range(-(-launch.threads // LANES))]

    def lanes_left(self, count: int) -> None:
        """Threads have exited: barriers of all threads may be complete now."""
        self.live -= count
        self.cluster.events += 1
        self.barriers.release_all(self.live)
        self.cluster.settle()
