"""BwdSignature: every compile-time fact of a backward pass, and nothing else."""

from dataclasses import dataclass

from .signature import HEAD_DIM_TILES, DTypeName, MaskKind, ScoreKind


@dataclass(frozen=True)
class BwdSignature:
    """What the kernels of a backward pass are compiled for.

    As in Signature lengths, strides, heads, true head dims, scale, softcap and window are run-time
    values.
    """

    dtype: DTypeName  # of q, k, v, out and all gradients
    head_dim: int  # tile of q and k, one of HEAD_DIM_TILES
    head_dim_v: int  # tile of v and out, one of HEAD_DIM_TILES
    mask: MaskKind
    deterministic: bool = False  # dQ is summed in one order
    is_ragged: bool = False  # sequences have lengths of their own, which live on the device
    score: ScoreKind | None = None  # what scaled scores go through ahead of the mask
    with_dq: bool = True  # else dK and dV alone
    with_dkv: bool = True  # else dQ alone

    quantised = None  # a signature of 16-bit inputs, for what asks either kind
    page_rows = 0

    def __post_init__(self):
        for name in ("head_dim", "head_dim_v"):
            if getattr(self, name) not in HEAD_DIM_TILES:
                raise ValueError(
                    f"{name}={getattr(self, name)} is none of the tiles {HEAD_DIM_TILES}"
                )
        if self.dtype not in ("bf16", "fp16"):
            raise ValueError(f"dtype={self.dtype!r} is neither 'bf16' nor 'fp16'")
        if self.mask not in ("full", "causal", "local"):
            raise ValueError(f"mask={self.mask!r} is none of 'full', 'causal', 'local'")
        if not (self.with_dq or self.with_dkv):
            raise ValueError("with_dq and with_dkv are False, and no gradient is left")
        if self.score not in (None, "softcap"):
            raise ValueError(f"score={self.score!r} is neither None nor 'softcap'")

    @property
    def depth(self) -> int:
        """Of all matrix products: FLOPs, by half of a tile of scores."""
        d, dv = self.head_dim, self.head_dim_v
        return d + dv + self.with_dkv * (d + dv) + self.with_dq * d
