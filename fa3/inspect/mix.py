"""Instruction mix: what kind of work each issue slot does."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .sass import Instruction

KINDS = {
    "mma": "HGMMA QGMMA IGMMA HMMA QMMA IMMA",
    "mufu": "MUFU",
    "fp32": "FFMA FMUL FADD FMNMX FMNMX3 FSEL FSETP FSET FCHK FFMA2 FMUL2 FADD2",
    "convert": "F2FP F2F F2I I2F I2FP FRND",
    "smem": "LDS STS LDSM STSM ATOMS",
    "local": "LDL STL",
    "gmem": "LDG STG ATOMG ATOM RED REDG LD ST LDGSTS UTMALDG UTMASTG UTMAREDG UTMACCTL "
    "UTMACMDFLUSH UBLKCP UBLKRED",
    "sync": "BAR SYNCS WARPSYNC WARPGROUP DEPBAR LDGDEPBAR NANOSLEEP FENCE MEMBAR BSYNC BSSY YIELD",
    "shuffle": "SHFL",
    "vote": "VOTE VOTEU MATCH REDUX ELECT",
    "move": "MOV UMOV PRMT R2UR UP2UR S2R CS2R S2UR",
    "nop": "NOP",
}
KIND_OF = {base: kind for kind, bases in KINDS.items() for base in bases.split()}
REST = "integer/control"


def kind(instruction: Instruction) -> str:
    """What an issue slot is spent on: a key of KINDS, or REST."""
    return KIND_OF.get(instruction.base, REST)


@dataclass(frozen=True)
class Mix:
    """Issue slots of one warp by kind; NOPs are counted but are no slots."""

    slots: int
    exponentials: int  # MUFU.EX2
    kinds: dict[str, int]  # most frequent first
    mma_shapes: dict[str, int]  # "64x128x16" -> instructions

    @classmethod
    def of(cls, code: Iterable[Instruction]) -> "Mix":
        code = list(code)
        kinds = Counter(map(kind, code))
        shapes = Counter("x".join(map(str, x.mma_shape)) for x in code if x.is_mma)
        return cls(
            slots=len(code) - kinds["nop"],
            exponentials=sum(x.is_exp2 for x in code),
            kinds=dict(kinds.most_common()),
            mma_shapes=dict(shapes),
        )

    @property
    def mmas(self) -> int:
        return sum(self.mma_shapes.values())

    @property
    def per_exponential(self) -> float:
        """Issue slots per exponential of one thread."""
        return self.slots / self.exponentials if self.exponentials else float("inf")

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.kinds.items())
