"""Wavefronts of shared memory: how often its 32 banks of 4 bytes are visited for one instruction.

Lanes that want the same word, or the same bank in different wavefronts, do not disturb each other.
CUDA C++ Programming Guide, shared memory: accesses of 8 and 16 bytes per lane are served by half
and quarter warps.  ldmatrix and stmatrix: a matrix of 8 rows of 16 bytes after another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BANKS = 32
BANK_BYTES = 4


class Wavefronts(NamedTuple):
    taken: int
    fewest: int  # for an access of this width by these lanes

    @property
    def conflicts(self) -> int:
        return self.taken - self.fewest


def of_groups(addresses: np.ndarray, nbytes: int, active: np.ndarray | None = None) -> Wavefronts:
    """Of accesses of nbytes at addresses (groups, lanes), each group served on its own.

    active: which lanes take part, default all.
    """
    words = max(1, nbytes // BANK_BYTES)
    at = addresses[:, :, None] // BANK_BYTES + np.arange(words)
    group = np.broadcast_to(np.arange(len(addresses))[:, None, None], at.shape)
    if active is not None:
        at, group = at[active], group[active]
    wanted = np.unique(np.stack([group.ravel(), at.ravel()]), axis=1)
    places = wanted[0] * BANKS + wanted[1] % BANKS
    visits = np.bincount(places, minlength=BANKS * len(addresses)).reshape(-1, BANKS).max(1)
    return Wavefronts(int(visits.sum()), int((visits > 0).sum()))


def of_warp(addresses: np.ndarray, nbytes: int, active: np.ndarray | None = None) -> Wavefronts:
    """Of one warp's ld.shared or st.shared of nbytes per lane; 32 addresses, some active."""
    parts = max(1, nbytes // BANK_BYTES)
    shape = parts, -1
    return of_groups(
        addresses.reshape(shape), nbytes, None if active is None else active.reshape(shape)
    )
