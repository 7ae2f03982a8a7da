"""Tensor maps: the 128 bytes of the hardware's CUtensorMap, decoded over registered memory.

    u64 at 0    global address
    u32 at 8    bits 0-3 = 2; 4-6 rank - 1; 7-10 type; 11-12 interleave; 13-15 swizzle;
                16 fill with NaN; 17-18 L2 promotion
    u32 at 12   strides of dimensions 1..4 in units of 16 bytes, low 32 bits
    u32 at 28   their bits 32-35, four for each
    u32 at 32   dimensions 0..4, minus 1
    at 52       element strides minus 1, three bits each
    u8 at 55    box 0..4, minus 1

Found by compiling probes with DSL 4.8.1, whose host code writes the bytes itself.  Type codes
follow the driver's enum only up to 7; 11 and 12 (tf32) are assumed.
"""

from __future__ import annotations

import numpy as np

from ..errors import KernelError, OutOfBounds, Unsupported
from ..numerics.formats import bf16_to_f32, f32_to_bf16
from ..numerics.reductions import REDUCTIONS
from .generic import PARAMETERS, WINDOW_SHIFT
from .places import Window
from .shared import OFFSET

BYTES = 128
SWIZZLE_MASK = {0: 0, 1: 1, 2: 3, 3: 7}  # none, 32, 64, 128 bytes -> xor mask on 16-byte chunks
# u8 u16 u32 s32 u64 s64 f16 f32 f32ftz f64 bf16 tf32 tf32ftz
_WIDTH = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
_S32, _BF16 = 3, 10
_FLOAT = {
    6: np.float16,
    7: np.float32,
    8: np.float32,
    9: np.float64,
    11: np.float32,
    12: np.float32,
}


class TensorMap:
    """box, dims and strides (bytes) with the contiguous dimension first."""

    def __init__(self, blob: np.ndarray, memory):
        words = blob.view(np.uint32).astype(np.int64).tolist()
        flags = words[2]
        rank, self.code = (flags >> 4 & 7) + 1, flags >> 7 & 15
        if flags & 15 != 2 or self.code >= len(_WIDTH) or rank > 5:
            raise KernelError(f"corrupt tensor map: flags {flags:#x}")
        if flags >> 11 & 3:
            raise Unsupported("tensor map with interleaved layout")
        swizzle = flags >> 13 & 7
        if swizzle not in SWIZZLE_MASK:
            raise Unsupported(f"tensor map swizzle mode {swizzle}")
        if words[13] & ((1 << 3 * rank) - 1):
            raise Unsupported("tensor map element strides")
        self.memory = memory
        self.swizzle = SWIZZLE_MASK[swizzle]
        self.fill_nan = bool(flags >> 16 & 1)
        self.width = _WIDTH[self.code]
        self.dtype = np.dtype(f"u{self.width}")
        self.address = words[0] | words[1] << 32
        self.dims = [x + 1 for x in words[8 : 8 + rank]]
        self.strides = [self.width] + [
            (words[3 + i] | (words[7] >> 4 * i & 15) << 32) << 4 for i in range(rank - 1)
        ]
        self.box = [int(x) + 1 for x in blob[55 : 55 + rank]]
        self.box_bytes = int(np.prod(self.box)) * self.width

    def overlaps(self, coords) -> bool:
        """Whether a part of the box at coords lies inside the tensor."""
        places = zip(coords, self.box, self.dims, strict=True)
        return all(x < n and x + b > 0 for x, b, n in places)

    def is_no_row(self, coords) -> bool:
        """Whether the box begins where the rows of a ragged tensor end.

        Two modes of one stride make a tensor of many ends, of which the second picks one: a
        sequence without rows is a box behind the last row of the first.
        """
        lengths = zip(coords, self.dims, self.strides, strict=True)
        return any(x == n and self.strides.count(step) > 1 for x, n, step in lengths)

    def _window(self, coords):
        """The part of the box at coords inside the tensor.

        (view of memory, slices of the box, (region, the same as a Window))
        """
        start, shape, tile = 0, [], []
        for x, b, n, stride in zip(coords, self.box, self.dims, self.strides, strict=True):
            first, last = max(x, 0), min(x + b, n)
            if first >= last:
                return None, None, None
            start += first * stride
            shape.append(last - first)
            tile.append(slice(first - x, last - x))
        # only what is touched must be registered: kernels offset the base, and let it wrap
        start = (self.address + start) % 2**64
        extent = sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True)) + self.width
        try:
            region = self.memory.find(start, start + extent, "TMA access")
        except OutOfBounds as e:
            raise OutOfBounds(f"{e}; {self} at {list(coords)}") from None
        at = start - region.start
        view = np.ndarray(shape[::-1], self.dtype, region.bytes, at, self.strides[::-1])
        window = Window(at, tuple(shape[::-1]), tuple(self.strides[::-1]), self.width)
        return view, tuple(tile[::-1]), (region, window)

    def __str__(self):
        return (
            f"tensor map base {self.address:#x} dims {self.dims} strides {self.strides} "
            f"box {self.box}"
        )

    def read(self, coords, seen: list | None = None) -> np.ndarray:
        """The bytes of the box at coords; zeros (or NaN) outside the tensor.

        seen: gets the (region, Window) that was read.
        """
        out = np.zeros(self.box[::-1], self.dtype)
        if self.fill_nan:
            out.fill({2: 0x7FFF, 4: 0x7FFFFFFF}.get(self.width, 0))
        view, tile, place = self._window(coords)
        if view is not None:
            out[tile] = view
            if seen is not None:
                seen.append(place)
        return out.reshape(-1).view(np.uint8)

    def write(self, coords, raw, reduction: str | None, seen: list | None = None) -> None:
        """Store the bytes of a box, or reduce them into the tensor; clipped to it.

        seen: gets the (region, Window) that was written, but for reductions, which are atomic.
        """
        view, tile, place = self._window(coords)
        if view is None:
            return
        if seen is not None and reduction is None:
            seen.append(place)
        x = raw.view(self.dtype).reshape(self.box[::-1])[tile]
        if reduction is None:
            view[...] = x
            return
        f = REDUCTIONS[reduction]
        if self.code == _BF16:
            view[...] = f32_to_bf16(f(bf16_to_f32(view), bf16_to_f32(x)))
            return
        dtype = _FLOAT.get(self.code, np.int32 if self.code == _S32 else self.dtype)
        old, new = (np.ascontiguousarray(t).view(dtype) for t in (view, x))
        view[...] = f(old, new).view(self.dtype)


def find(w, address: int) -> TensorMap:
    """The tensor map at a generic address, decoded once per launch and content."""
    if address >> WINDOW_SHIFT == PARAMETERS:
        at = address & 0xFFFFFFFF
        blob = w.params[at : at + BYTES]
    else:
        region = w.memory.find(address, address + BYTES, "tensor map read")
        at = address - region.start
        blob = region.bytes[at : at + BYTES]
    key = blob.tobytes()
    maps = w.launch.tensor_maps
    if key not in maps:
        maps[key] = TensorMap(blob.copy(), w.memory)
    return maps[key]


def replace(w, m, space, address, offset, field, ordinal, value):
    """tensormap.replace.tile.{global_address, global_dim, global_stride}"""
    for lane in w.lane_list(m):
        at, v = w.lane_value(address, lane) + offset, w.lane_value(value, lane)
        if space == "shared":
            blob = w.cta.smem.raw[at & OFFSET : (at & OFFSET) + BYTES]
        else:
            region = w.memory.find(at, at + BYTES, "tensor map write")
            blob = region.bytes[at - region.start : at - region.start + BYTES]
        words = blob.view(np.uint32)
        if field == "global_address":
            blob[:8].view(np.uint64)[0] = v
        elif field == "global_dim":
            words[8 + ordinal] = (v - 1) & 0xFFFFFFFF
        else:
            shift = 4 * ordinal
            words[3 + ordinal] = (v >> 4) & 0xFFFFFFFF
            words[7] = (int(words[7]) & ~(15 << shift)) | (v >> 36 & 15) << shift


def copy(w, m, dst, dst_offset, src, src_offset, nbytes):
    """tensormap.cp_fenceproxy: shared -> global."""
    for lane in w.lane_list(m):
        s = (w.lane_value(src, lane) + src_offset) & OFFSET
        d = w.lane_value(dst, lane) + dst_offset
        region = w.memory.find(d, d + nbytes, "tensor map write")
        at = d - region.start
        region.bytes[at : at + nbytes] = w.cta.smem.raw[s : s + nbytes]
