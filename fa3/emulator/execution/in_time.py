"""The order of a profiled cluster: of what is ready, the earliest in nominal time goes next.

Everything completes at once, as in the eager schedule; only clocks say how long it took.
"""

from __future__ import annotations

from .fragments import merge, run_fragment
from .interleaving import ahead_of, ready_of


def run_in_time(cluster) -> None:
    running = cluster.warpgroups
    while running := [w for w in running if w.fragments]:
        cluster.check_limit()
        ready = [
            (f.moment.time, i, w, f) for i, w in enumerate(running) for f in ready_of(w.fragments)
        ]
        if ready:
            _, _, w, f = min(ready, key=lambda x: x[:2])
            cluster.step(w, lambda w=w, f=f: _run(w, f))
            continue
        cluster.stall(running)


def _run(w, fr) -> None:
    """One segment."""
    if len(w.fragments) > 1:
        merge(w.fragments, fr)
    run_fragment(w, fr, ahead_of(w.fragments, fr), 1)
