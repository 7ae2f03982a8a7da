"""setmaxnreg: how the warps of a CTA share the registers of an SM.

A launch gives every thread the same number of registers, chosen by ptxas: here as many as the file
has for the CTA's threads, which is the most it can choose.  .dec returns some, .inc waits until
others have returned enough.
"""

from __future__ import annotations

from ..errors import KernelError

FILE = 65536  # 32-bit registers of an SM
_UNIT = 8  # registers of a thread
_LEAST, _MOST = 24, 256


class RegisterFile:
    def __init__(self, threads: int):
        self.at_launch = min(_MOST, FILE // max(threads, 128) // _UNIT * _UNIT)
        self.free = FILE - self.at_launch * -(-threads // 32) * 32
        self.of_warp: dict[int, int] = {}  # warp -> registers of a thread, where they changed


def change(w, fr, grows: bool, count: int, pc: int, after: int) -> int:
    """setmaxnreg.inc and .dec to `count` registers per thread, by whole warpgroups."""
    file, warps = w.cta.registers, w.warps(fr.mask)
    if count % _UNIT or not _LEAST <= count <= _MOST:
        raise KernelError(
            f"setmaxnreg {count}: must be a multiple of {_UNIT} from {_LEAST} to {_MOST}"
        )
    now = {warp: file.of_warp.get(warp, file.at_launch) for warp in warps}
    known = file.of_warp if grows else now  # ptxas may have chosen less than at_launch
    wrong = [n for i, n in now.items() if i in known and (n > count if grows else n < count)]
    if wrong:
        raise KernelError(
            f"setmaxnreg.{'inc' if grows else 'dec'} to {count} of warps that have {wrong[0]} "
            "registers a thread"
        )
    needed = sum(32 * (count - n) for n in now.values())
    if needed <= file.free:
        file.free -= needed
        file.of_warp.update(dict.fromkeys(warps, count))
        w.cluster.events += 1
        return after
    fr.pc = pc
    fr.wait_until(
        lambda: needed <= file.free,
        lambda: f"setmaxnreg to {count}: needs {needed} registers more, {file.free} are free",
    )
    return -1
