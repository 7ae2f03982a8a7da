"""One SM sub-partition of Hopper as numbers."""

from dataclasses import dataclass

SMS = 132  # H100 SXM5, H200
CLOCK = 1.72  # GHz; fitted together with Machine.steal and Machine.slow, not a measured clock
BANDWIDTH = 3.35e12  # bytes per second of an H100 SXM5's memory, by its data sheet
BYTES_PER_CYCLE = BANDWIDTH / (SMS * CLOCK * 1e9)  # of an SM
TAIL = 0.97  # share of the time in the steady loop on full waves: 15.5 waves in 16


@dataclass(frozen=True)
class Machine:
    """Pipe occupancy and latency in cycles; an instruction is that of a warp.

    Occupancy is how long an instruction keeps its pipe, latency how long after issue the
    scoreboard is released. ptxas issues FMNMX and F2FP 2 apart and MUFU 8 apart, which agrees with
    `alu` and `xu`. `steal`, `slow` and CLOCK are fitted to measured kernels.
    """

    fma: int = 2  # of each half: FFMA, FMUL, FADD use either of two 16-lane halves
    alu: int = 2  # 16 lanes: FMNMX, F2FP, LOP3, ISETP, ...
    xu: int = 8  # 4 lanes: MUFU, F2I, I2F
    uniform: int = 2
    lsu: int = 4  # one 32-bit shared-memory access or shuffle, all four SMSPs at it
    tensor_flops: int = 1024  # 16-bit FLOP per cycle and SMSP; 8-bit twice that
    smem_bytes: int = 128  # per cycle and SM, operands of the tensor core
    lat_xu: int = 20
    lat_shfl: int = 24
    lat_lds: int = 30
    lat_local: int = 36
    lat_sync: int = 20  # SYNCS try_wait that succeeds
    lat_other: int = 14  # S2UR, R2UR, ...
    lat_read: int = 12  # a read barrier: operands fetched
    lat_bar: int = 24  # BAR.SYNC, last arrival to release
    branch: int = 8  # refetch after a taken branch, beyond its stall count
    mma_queue: int = 2  # MMAs that may wait behind the running one
    mma_start: int = 12  # issue to start on an idle tensor core
    mma_drain: int = 30  # last MMA's end to the release of WARPGROUP.DEPBAR
    mma_eff: float = 1.0  # fraction of the peak rate that back-to-back MMAs reach
    steal: float = 0.7  # MMA cycles lost per register that another instruction reads
    slow: float = 0.8  # while an MMA runs, cycles per register until the next operands can be read
    smem_share: float = 1.0  # MMA cycles lost per cycle of LDS/STS, times the MMA's own smem use
    l2_sums: float = 17.4  # bytes of fp32 sums that L2 takes per cycle and SM, of all SMs at once
    sums_queue: int = 2  # REDs of a warp that may wait for their turn
    l2_bytes: float = 0.0  # K/V bytes per cycle and SM from TMA; 0: the producer is always ahead


# (steal, slow, clock): constants that fit the calibration set as well. They are poorly separated by
# it, so a change is believable only where all of them agree on its sign.
RIVALS = ((0.7, 0.8, 1.72), (0.85, 0.0, 1.79), (0.85, 1.2, 1.81), (0.5, 0.8, 1.63))
