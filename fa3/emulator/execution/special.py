"""Special registers, as rows of 32-bit lanes made when first read."""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported

_AXES = {"x": 0, "y": 1, "z": 2}
_u4, _u8 = np.uint32, np.uint64


class SpecialRegisters(dict):
    """Name -> row; the warpgroup's position in the launch decides."""

    def __init__(self, w):
        super().__init__()
        self._w = w

    def __missing__(self, name: str) -> np.ndarray:
        value = self._value(name)
        if value is None:
            raise Unsupported(f"special register {name}")
        row = self[name] = np.broadcast_to(np.asarray(value, _u4), (self._w.lanes,)).copy()
        return row

    def _value(self, name: str):
        base, _, axis = name.partition(".")
        return self._of_axis(base, _AXES[axis]) if axis in _AXES else self._scalar(base)

    def _of_axis(self, base: str, axis: int):
        w, launch = self._w, self._w.launch
        cta, cluster = w.cta.position[axis], launch.cluster[axis]
        if base == "%tid":
            t = np.arange(w.lanes) + w.first_thread
            bx, by, _ = launch.block
            return (t % bx, t // bx % by, t // (bx * by))[axis]
        return {
            "%ntid": launch.block[axis],
            "%ctaid": cta,
            "%nctaid": launch.grid[axis],
            "%clusterid": cta // cluster,
            "%nclusterid": launch.grid[axis] // cluster,
            "%cluster_ctaid": cta % cluster,
            "%cluster_nctaid": cluster,
        }.get(base)

    def _scalar(self, name: str):
        w, launch = self._w, self._w.launch
        lane = np.arange(w.lanes, dtype=_u8) & _u8(31)
        if name == "%laneid":
            return lane
        if name == "%warpid":
            return (np.arange(w.lanes) + w.first_thread) >> 5
        if name.startswith("%lanemask_"):
            bit = _u8(1) << lane
            below = bit - _u8(1)
            return {"lt": below, "eq": bit, "le": below | bit, "gt": ~(below | bit), "ge": ~below}[
                name[-2:]
            ].astype(_u4)
        size = int(np.prod(launch.cluster))
        return {
            "%nwarpid": (launch.threads + 31) // 32,
            "%smid": w.cta.number % launch.sms,
            "%nsmid": launch.sms,
            "%gridid": 1,
            "%dynamic_smem_size": launch.dynamic_smem,
            "%total_smem_size": launch.smem_bytes,
            "%cluster_ctarank": w.cta.rank,
            "%cluster_nctarank": size,
            "%is_explicit_cluster": int(size > 1),
        }.get(name)
