"""BwdPlan: the compile-time numbers of the backward kernel, and its named barriers."""

from dataclasses import dataclass

import cutlass.cute as cute

from ...bwd_signature import BwdSignature
from ...elements import ELEMENT
from ...lengths import EqualLengths, RaggedLengths
from ...tiling import KeyTiles
from ..bwd_config import SIDE_WARPS, Sm80BwdConfig
from ..config import MAX_SMS
from ..copies import TileLayout
from ..mma import ROWS


@dataclass(frozen=True)
class BwdBarriers:
    """Hardware barriers of some warps of a CTA, by event; 0 is __syncthreads."""

    key_warps: int

    @property
    def _warps(self) -> int:
        """Of a side that have the same keys."""
        return SIDE_WARPS // self.key_warps

    def p_written(self, keys):
        """Both sides' warps of the same keys: P is there."""
        cute.arch.barrier(barrier_id=1 + keys, number_of_threads=64 * self._warps)

    def let_p_be_read(self, keys):
        """p_written() of a warp that waits for none."""
        cute.arch.barrier_arrive(barrier_id=1 + keys, number_of_threads=64 * self._warps)

    def ds_written(self, keys):
        """One side's warps of the same keys: dS is there."""
        number = 1 + self.key_warps + keys
        cute.arch.barrier(barrier_id=number, number_of_threads=32 * self._warps)


@dataclass(frozen=True)
class BwdPlan:
    """The compile-time numbers of a kernel."""

    signature: BwdSignature
    config: Sm80BwdConfig

    @property
    def element(self) -> type:
        return ELEMENT[self.signature.dtype]

    @property
    def tiling(self) -> KeyTiles:
        signature, config = self.signature, self.config
        sizes = config.tile_m, config.tile_n
        return KeyTiles(signature.mask, *sizes, signature.deterministic, MAX_SMS)

    @property
    def lengths(self) -> EqualLengths | RaggedLengths:
        return (RaggedLengths if self.signature.is_ragged else EqualLengths)(self)

    @property
    def barriers(self) -> BwdBarriers:
        return BwdBarriers(self.config.key_warps)

    @property
    def key_groups(self) -> int:
        """Of 16 keys, of a warp."""
        return self.config.keys_per_warp // ROWS

    @property
    def q(self) -> TileLayout:
        return TileLayout(self.config.tile_m, self.signature.head_dim)

    @property
    def do(self) -> TileLayout:
        return TileLayout(self.config.tile_m, self.signature.head_dim_v)

    @property
    def k(self) -> TileLayout:
        return TileLayout(self.config.tile_n, self.signature.head_dim)

    @property
    def v(self) -> TileLayout:
        return TileLayout(self.config.tile_n, self.signature.head_dim_v)

    @property
    def p(self) -> TileLayout:
        """Of P^T and dS^T: a row is a key."""
        return TileLayout(self.config.tile_n, self.config.tile_m)
