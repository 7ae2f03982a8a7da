"""Predicts a Hopper attention kernel's speed from its cubin, with no GPU: `python -m fa3 predict`.

One steady iteration of every consumer warpgroup runs on a model of one SM sub-partition (SMSP),
which holds one warp of each: in-order issue, one instruction a cycle, scoreboards from the kernel's
own control bits, pipe rates, an asynchronous tensor core, and the named barriers of a ping-pong.
What it takes to fit measured kernels is contention: while a matrix product runs, each register that
another instruction reads costs the tensor core time. docs/timing_model.md says how the constants
were chosen and how far to trust the figures.

Not modelled: the producer warps, TMA and L2 bandwidth (`Machine.l2_bytes` gives a floor), the
instruction cache, bank conflicts, power and clocks, and all outside of the steady loop (`tail`).

    machine   rates, latencies and the calibrated constants
    trace     which instructions a warp issues in one iteration: which branches are taken
    ops       an instruction as the machine sees it: pipe, cycles, registers read
    whatif    edits of a trace: no rescale, emulated exponentials, no barriers
    simulate  the machine at work
    predict   cubin -> Prediction
    report    text and timeline
    calibrate the constants, from measured speeds
"""

from .machine import Machine
from .predict import Prediction, predict

__all__ = ["Machine", "Prediction", "predict"]
