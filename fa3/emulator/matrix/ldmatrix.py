"""ldmatrix and stmatrix: warps move 8 x 8 matrices of 16-bit elements, 16 bytes per lane."""

from __future__ import annotations

import numpy as np

from ..errors import Misaligned, OutOfBounds
from ..numerics.formats import rows


def row_addresses(w, m, address, offset, n):
    """(warps, (warps, n, 8) row addresses) of the warps taking part."""
    warps = np.arange(w.lanes // 32) if m is None else np.flatnonzero(m.reshape(-1, 32).any(1))
    a = rows(address, w.lanes).reshape(-1, 32)[warps, : 8 * n].astype(np.int64) + offset
    if (a & 15).any():
        raise Misaligned(f"ldmatrix/stmatrix row address {int(a[(a & 15) != 0][0]):#x}")
    if a.max() + 16 > w.cta.smem.size:
        raise OutOfBounds(f"ldmatrix/stmatrix row at {int(a.max()):#x} outside shared memory")
    return warps, a.reshape(len(warps), n, 8)


def load(w, m, registers, address, offset, transposed):
    n, smem = len(registers), w.cta.smem
    warps, a = row_addresses(w, m, address, offset, n)
    if smem.written is not None:
        smem.written.require(a.ravel(), 16, "ldmatrix")
    if w.races is not None:
        threads = w.threads[warps * 32][:, None] + np.arange(8 * n)  # who gave the addresses
        w.races.generic(smem, a, 16, threads, writes=False, each=_each(w, warps, n))
    x = smem.chunks[a >> 4].view(np.uint16)  # (warps, n, 8, 8)
    if transposed:
        x = np.ascontiguousarray(x.swapaxes(2, 3))
    x = x.view(np.uint32).reshape(len(warps), n, 32)
    for i, row in enumerate(registers):
        row.reshape(-1, 32)[warps] = x[:, i]


def store(w, m, registers, address, offset, transposed):
    n, smem = len(registers), w.cta.smem
    warps, a = row_addresses(w, m, address, offset, n)
    x = np.stack([rows(r, w.lanes).reshape(-1, 32)[warps] for r in registers], 1)
    x = np.ascontiguousarray(x).view(np.uint16).reshape(len(warps), n, 8, 8)
    if transposed:
        x = np.ascontiguousarray(x.swapaxes(2, 3))
    smem.chunks[a >> 4] = x.view(np.uint64).reshape(len(warps), n, 8, 2)
    if w.checks.tracks_writes:
        _note_writes(w, smem, warps, a)


def _note_writes(w, smem, warps, a):
    """Lane 4 r + c wrote word c of row r of every matrix."""
    first = w.threads[warps * 32][:, None, None] + 4 * np.arange(8)[None, None, :]
    everyone = np.broadcast_to(first, a.shape)
    words = np.arange(4)
    smem.note(w, a[..., None] + 4 * words, 4, everyone[..., None] + words, raced=False)
    if w.races is not None:
        each = _each(w, warps, a.shape[1])
        w.races.generic(smem, a, 16, everyone, writes=True, each=each)


def _each(w, warps, n: int) -> np.ndarray:
    """(8 n rows of each warp, 4): lane 4 r + c has word c of row r of every matrix."""
    lanes = np.tile(np.arange(32).reshape(8, 4), (n, 1))
    return (w.threads[warps * 32][:, None, None] + lanes).reshape(-1, 4)
