"""FwdConfig: how the forward kernel is laid out, the part of a kernel that tuning may change."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from .ctas import HOPPER_CTAS
from .signature import Signature

SMEM_LIMIT = 232_448  # bytes of dynamic shared memory per CTA on sm_90 (227 KiB)
BARRIER_BYTES = 1024  # mbarriers and alignment

# Where O waits for its TMA store.
# own: a buffer of its own: the next tile's loads and the epilogue do not meet.
# k:   the slot of the tile's last K block, released once O has left; Q and the other slots refill.
# kv:  the same, half in the slot of the last K block and half in that of the last V block.
# q:   the space of Q: the next Q waits until O has left.
# registers: nowhere. O of FP8 inputs, and partial O, is stored from registers, without TMA.
OSpace = Literal["own", "k", "kv", "q", "registers"]

# Who computes which tile.
# static:  dealt ahead, longest first (scheduler.py): nothing is asked for while a kernel runs.
# dynamic: longest first, each to the CTA that asks first (sm90/tile_queue.py): one that was held
#          up gets fewer.
ScheduleKind = Literal["static", "dynamic"]


def check_fields(config, rules: Iterable[tuple[str, bool, str]]) -> None:
    """rules: name of a field, whether it is right, and what is."""
    for name, is_right, expected in rules:
        if not is_right:
            raise ValueError(f"{name} is {getattr(config, name)!r}, expected {expected}")


def check_memory(config, needed: int, limit: int, smaller: str) -> None:
    """smaller: the fields that need less shared memory where they are."""
    if needed > limit:
        raise ValueError(
            f"{config} needs {needed} bytes of shared memory per CTA, the limit is {limit}: "
            f"choose a smaller {smaller}"
        )


@dataclass(frozen=True)
class FwdConfig:
    """Tiles and pipeline depth of the forward kernel.

    A CTA holds one producer warpgroup and `num_mma_warpgroups` consumers of 64 query rows each.
    """

    tile_n: int  # key rows per step
    num_mma_warpgroups: int = 2
    num_stages: int = 2  # depth of the K ring and of the V ring
    o_slice: int = 0  # FP8: columns of O per product, where not all fit beside S; or 0
    polynomial_exp2: int = 0  # one of this many exponentials on the FMA pipe (exp2.py); 0: none
    o_space: OSpace | None = None  # None: the first one that is large enough
    spared_registers: int = 0  # that a consumer's thread leaves to those of the producer
    schedule: ScheduleKind | None = None  # None: dynamic where tiles differ in length
    cluster: int = 1  # CTAs that share what they load of K and V (rings.Ring)

    ctas_per_sm = 1
    max_ctas = HOPPER_CTAS  # that a list of tiles is dealt to

    @property
    def tile_m(self) -> int:
        """Query rows per CTA."""
        return 64 * self.num_mma_warpgroups

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.num_mma_warpgroups)

    @property
    def producer_registers(self) -> int:
        own = {1: 56, 2: 24, 3: 32}[self.num_mma_warpgroups]
        return own + self.num_mma_warpgroups * self.spared_registers

    @property
    def consumer_registers(self) -> int:
        return {1: 256, 2: 240, 3: 160}[self.num_mma_warpgroups] - self.spared_registers

    def check(self, signature: Signature) -> None:
        """Raises ValueError, which names the field and its limits, if no kernel can be so."""
        check_fields(self, self._rules(signature))
        smaller = "tile_n, num_stages or num_mma_warpgroups"
        check_memory(self, self.smem_bytes(signature), SMEM_LIMIT, smaller)

    def _rules(self, signature: Signature) -> Iterator[tuple[str, bool, str]]:
        """Name of a field, whether it is right, and what is."""
        quantised, dv = signature.quantised, signature.head_dim_v
        unit = 16 if quantised is None else 32  # wgmma's K: the keys of one step of P V
        keys = range(unit, 257, unit)
        yield "tile_n", self.tile_n in keys, f"a multiple of {unit} from {unit} to 256"
        yield "num_mma_warpgroups", self.num_mma_warpgroups in (1, 2, 3), "1, 2 or 3"
        yield "num_stages", self.num_stages >= 1, "at least 1"
        if signature.gathers:  # a stage is full when the next one has been asked for
            yield "num_stages", self.num_stages >= 2, "at least 2 where rows are gathered"
            right = self.schedule != "dynamic"
            yield "schedule", right, "static or None where rows are gathered, by several warps"
        right = self.schedule in (None, "static", "dynamic")
        yield "schedule", right, "static, dynamic or None"
        yield "polynomial_exp2", self.polynomial_exp2 >= 0, "at least 0"
        yield "spared_registers", self.spared_registers in range(0, 65, 8), "0, 8, .. 64"
        yield "cluster", self.cluster in (1, 2), "1 or 2"
        if self.cluster > 1:  # all of its CTAs visit the same blocks at the same time
            right = self.may_cluster(signature)
            yield "cluster", right, "1 but for 16-bit inputs, the full mask and equal lengths"
            right = self.schedule != "dynamic"
            yield "schedule", right, "static or None for a cluster, whose tiles are dealt together"
        if quantised is None:
            yield "o_slice", self.o_slice == 0, "0, as O of 16-bit inputs is not sliced"
            if signature.is_split:
                right = self.o_space in (None, "registers")
                yield "o_space", right, "registers or None for partial results"
            else:
                right = self.o_space != "registers"
                yield "o_space", right, "own, k, kv, q or None for 16-bit inputs"
            return
        slices = [0, *(n for n in range(8, dv, 8) if dv % n == 0)]
        yield "o_slice", self.o_slice in slices, f"one of {slices}"
        yield "o_space", self.o_space in (None, "registers"), "registers or None for FP8 inputs"
        divides = quantised.v_block % self.tile_n == 0  # a product P V has one scale of V
        yield "tile_n", divides, f"a divisor of {quantised.v_block}, the keys per scale of v"

    def may_cluster(self, signature: Signature) -> bool:
        """Whether all tiles visit the same blocks, in the same order, and TMA fills the rings."""
        x = signature
        is_16_bit = x.quantised is None and x.widens is None
        return x.mask == "full" and is_16_bit and not x.is_ragged and not x.is_split

    def is_dynamic(self, signature: Signature) -> bool:
        """`schedule`, or that of the mask and the lengths."""
        if self.schedule is None:
            is_uneven = signature.mask != "full" or signature.is_ragged
            return is_uneven and not signature.gathers  # by several warps, which nobody tells
        return self.schedule == "dynamic"

    def space_of_o(self, signature: Signature) -> OSpace:
        """`o_space`, or the first of the spaces that is large enough."""
        if signature.quantised is not None or signature.is_split:
            return "registers"
        if self.o_space is not None:
            return self.o_space
        q, o, k_stage, v_stage = self.elements(signature)
        if self._bytes(signature, q + o) <= SMEM_LIMIT:
            return "own"
        # Two stages: then no warpgroup can be two tiles ahead of one that still writes O to a slot.
        if self.num_stages == 2 and o <= k_stage:
            return "k"
        if self.num_stages == self.num_mma_warpgroups == 2 and o // 2 <= min(k_stage, v_stage):
            return "kv"
        return "q"

    def smem_bytes(self, signature: Signature) -> int:
        """Shared memory of a CTA."""
        q, o, k_stage, v_stage = self.elements(signature)
        if signature.quantised is not None:  # V has two rings
            return q + self.num_stages * (k_stage + 2 * v_stage) + BARRIER_BYTES
        q_and_o = {"own": q + o, "q": max(q, o)}.get(self.space_of_o(signature), q)
        return self._bytes(signature, q_and_o)

    def elements(self, signature: Signature) -> tuple[int, int, int, int]:
        """Of Q, O, a K stage and a V stage."""
        d, dv = signature.head_dim, signature.head_dim_v
        return self.tile_m * d, self.tile_m * dv, self.tile_n * d, self.tile_n * dv

    def _bytes(self, signature: Signature, q_and_o: int) -> int:
        """Of 16-bit operands, and of the bytes that some are made of."""
        _, _, k_stage, v_stage = self.elements(signature)
        size = 3 if signature.widens else 2
        return 2 * q_and_o + size * self.num_stages * (k_stage + v_stage) + BARRIER_BYTES
