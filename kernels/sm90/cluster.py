"""A cluster: CTAs, neighbours in the grid, that write to each other's shared memory."""

from dataclasses import dataclass

import cutlass.cute as cute

from ..arithmetic import maximum


@dataclass(frozen=True)
class Cluster:
    """One CTA is none: it costs nothing."""

    size: int  # CTAs

    @property
    def launch(self) -> dict:
        """Options of a launch."""
        return {} if self.size == 1 else {"cluster": (self.size, 1, 1)}

    def whole(self, num_ctas):
        """As many CTAs in whole clusters, of which there is one at least."""
        return num_ctas if self.size == 1 else maximum(num_ctas // self.size, 1) * self.size

    def start(self):
        """By all threads, between the barriers' initialisation and the first arrival."""
        if self.size == 1:
            cute.arch.sync_threads()
        else:
            self._meet()

    def end(self):
        """By all threads: a CTA's barriers must outlive the others' arrivals at them."""
        if self.size > 1:
            self._meet()

    def _meet(self):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
