"""The kernels that this project ships, by Signature: what is compiled, inspected and listed."""

from dataclasses import MISSING, dataclass, fields, replace
from itertools import product

from fa3.inspect.cli import TARGETS, AnySignature, features
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.signature import Quantised, Signature
from fa3.launch import dispatch, tuning

SIXTEEN_BIT = ("bf16", "fp16")
MASKS = ("full", "causal", "local")
# scales of one-byte inputs -> what they make of a kernel
QUANTISED = {
    "block scales": Quantised("e4m3", "e4m3", "bf16", k_block=128, v_block=128),
    "one scale": Quantised("e4m3", "e4m3", "bf16"),
    "int8 scores": Quantised("int8", "e4m3", "bf16", k_block=128, v_block=128),
}
KIND_OF = {quantised: kind for kind, quantised in QUANTISED.items()}


@dataclass(frozen=True)
class Variant:
    """A kernel for an architecture."""

    signature: AnySignature
    arch: str = "sm_90a"

    @property
    def target(self) -> dispatch.Target:
        return TARGETS[self.arch]

    @property
    def name(self) -> str:
        words = [] if self.arch == "sm_90a" else [self.arch]
        words += ["backward"] * isinstance(self.signature, BwdSignature)
        return " ".join([*words, name_of(self.signature)])


def dtype_of(dims: tuple[int, int], mask: str) -> str:
    """The dtype in which a kernel of 16 bits is looked at and tested where one has to do.

    They differ in the conversion of a result. Tests and tables that agree on it share kernels.
    """
    return "fp16" if mask != "full" and dims[1] in (96, 192, 256) else "bf16"


def sixteen_bit() -> list[Signature]:
    """All of them: by row of the tuning table, dtype and mask."""
    kinds = product(sorted(tuning.FORWARD), SIXTEEN_BIT, MASKS)
    return [Signature(dtype, *dims, mask) for dims, dtype, mask in kinds]


def one_byte() -> list[Signature]:
    """By row of the tuning table, scales and mask: e4m3 with bf16 results."""
    kinds = product(sorted(tuning.FORWARD_FP8), QUANTISED.values(), MASKS)
    return [Signature(quantised.k, *dims, mask, quantised) for dims, quantised, mask in kinds]


def with_scores() -> list[Signature]:
    """A few with a function of scores, a sink or splits, which differ from the others in little."""
    block_scales = QUANTISED["block scales"]
    return [
        Signature("bf16", 128, 128, "full", score="softcap"),
        Signature("bf16", 64, 64, "causal", sinks=True),
        Signature("e4m3", 128, 128, "causal", block_scales, score="softcap", sinks=True),
        Signature("bf16", 128, 128, "full").split(),
        Signature("e4m3", 128, 128, "full", block_scales).split(),
    ]


def of_caches() -> list[Signature]:
    """Every config of 16-bit q beside a cache of bytes, and what split and paged kernels risk.

    Mostly kernels that the tests of accuracy run, and those with configs of their own.
    """
    paged = {"is_ragged": True, "widens": "e4m3"}
    of_bytes = Signature("e4m3", 256, 256, "local", QUANTISED["one scale"], is_ragged=True)
    return [
        Signature("bf16", 64, 64, "causal", page_rows=16, packs_heads=True, **paged),
        Signature("bf16", 96, 96, "full", page_rows=16, **paged).split(),
        Signature("fp16", 128, 128, "full", page_rows=128, **paged),
        Signature("bf16", 192, 128, "local", page_rows=64, packs_heads=True, **paged),
        Signature("fp16", 192, 192, "local", page_rows=64, **paged).split(),
        Signature("fp16", 256, 256, "causal", page_rows=128, packs_heads=True, **paged),
        Signature("e4m3", 96, 96, "local", QUANTISED["block scales"]).split(),
        replace(of_bytes, page_rows=16),
        replace(of_bytes, page_rows=1),
    ]


def compared() -> list[Signature]:
    """Of dense forward kernels for Hopper: each row of the tables with each mask, every config."""
    rows, kinds = sorted(tuning.FORWARD), list(QUANTISED.values())
    found = [Signature(dtype_of(dims, mask), *dims, mask) for dims, mask in product(rows, MASKS)]
    for (i, dims), (j, mask) in product(enumerate(sorted(tuning.FORWARD_FP8)), enumerate(MASKS)):
        # Without a mask in blocks; with either of the others each kind of scales in turn.
        quantised = kinds[(i + j) % len(kinds)] if j else kinds[0]
        found.append(Signature(quantised.k, *dims, mask, quantised))
    own_config = Signature("e4m3", 64, 64, "full", QUANTISED["one scale"])
    return [*found, own_config]


def backward() -> list[Variant]:
    """Every pair of a row of the tuning table and a mask."""
    kinds = product(tuning.BACKWARD, MASKS)
    found = [BwdSignature(dtype_of(dims, mask), *dims, mask) for dims, mask in kinds]
    in_order = [
        BwdSignature("bf16", 64, 64, "full", deterministic=True),
        BwdSignature("fp16", 256, 256, "causal", deterministic=True),
    ]
    return [Variant(signature) for signature in found + in_order]


def backward_with_options() -> list[Variant]:
    """A few with a function of scores, and without some gradients: those that tests run."""
    found = (
        BwdSignature("bf16", 64, 64, "causal", score="softcap"),
        BwdSignature("fp16", 128, 128, "local", score="softcap"),
        BwdSignature("bf16", 192, 128, "full", score="softcap"),
        BwdSignature("bf16", 64, 64, "causal", with_dq=False),
        BwdSignature("bf16", 192, 128, "local", with_dq=False),
        BwdSignature("bf16", 64, 64, "causal", with_dkv=False),
        BwdSignature("bf16", 192, 128, "local", with_dkv=False),
    )
    return [*map(Variant, found)]


def ampere() -> list[Variant]:
    """Forward, for much and for little shared memory: every pair with a row of the table, and every
    mask, but for combinations that differ in little."""
    large, small = "sm_80", "sm_89"
    kinds = (
        (large, 64, 64, "causal"),
        (large, 96, 96, "full"),
        (small, 96, 96, "local"),
        (large, 128, 128, "causal"),
        (small, 128, 128, "local"),
        (large, 192, 128, "full"),
        (large, 192, 192, "causal"),
        (small, 192, 192, "causal"),
        (large, 256, 256, "causal"),
        (large, 256, 256, "full", None, False, "softcap", True),
        (small, 256, 256, "full"),
        (large, 128, 128, "local", None, True, "softcap", True),
    )
    return [Variant(Signature("bf16", *facts), arch) for arch, *facts in kinds]


def ampere_backward() -> list[Variant]:
    """As `ampere`: those that the tests of accuracy run, and what else the tables have."""
    large, small = "sm_80", "sm_89"
    kinds = (
        (large, "fp16", 64, 64, "causal"),
        (large, "bf16", 96, 96, "local"),
        (large, "bf16", 128, 128, "causal"),
        (small, "fp16", 128, 128, "full"),
        (large, "fp16", 192, 128, "full"),
        (small, "bf16", 192, 192, "local"),
        (large, "bf16", 256, 256, "causal"),
        (small, "fp16", 256, 256, "full"),
        (large, "bf16", 64, 64, "causal", False, False, "softcap"),
        (large, "fp16", 192, 192, "local", False, False, "softcap"),
        (large, "bf16", 64, 64, "causal", False, True),
        (large, "fp16", 128, 128, "local", True, True, "softcap"),
        (large, "bf16", 192, 128, "causal", False, True),
        (small, "bf16", 256, 256, "full", False, True),
        (large, "bf16", 96, 96, "local", True, True, "softcap"),
        (small, "bf16", 96, 96, "local", True, True, "softcap"),
        (large, "bf16", 64, 64, "causal", True),
        (large, "bf16", 192, 192, "local"),
        (small, "bf16", 96, 96, "causal"),
        (small, "bf16", 192, 128, "full"),
    )
    return [Variant(BwdSignature(*facts), arch) for arch, *facts in kinds]


def every_ampere() -> list[Variant]:
    """Each config of the tables of Ampere with each mask, and once with all that a call may ask.

    Of the backward pass with softcap, too, which has configs of its own.
    """
    found = []
    for arch, mask in product(("sm_80", "sm_89"), MASKS):
        plain = [Signature("bf16", *dims, mask) for dims in sorted(tuning.FORWARD)]
        plain += [BwdSignature("bf16", *dims, mask) for dims in sorted(tuning.BACKWARD)]
        found += [Variant(signature, arch) for signature in plain]
        if mask != "local":
            back = [s for s in plain if isinstance(s, BwdSignature)]
            found += [Variant(replace(s, score="softcap"), arch) for s in back]
        else:
            more = [replace(s, is_ragged=True, score="softcap") for s in plain]
            found += [
                Variant(replace(s, deterministic=True), arch)
                if isinstance(s, BwdSignature)
                else Variant(replace(s, sinks=True), arch)
                for s in more
            ]
    return found


def shipped() -> list[Signature]:
    return sixteen_bit() + one_byte()


def is_main(signature: Signature) -> bool:
    """What most calls get: bf16, or e4m3 with scales per block."""
    quantised = signature.quantised
    return signature.dtype == "bf16" or quantised == QUANTISED["block scales"]


def name_of(signature: AnySignature) -> str:
    """Such as "128 bf16 full" or "192/128 e4m3 causal, block scales"."""
    dims = "/".join(map(str, dict.fromkeys((signature.head_dim, signature.head_dim_v))))
    scales = []
    if signature.quantised:
        scales.append(KIND_OF[replace(signature.quantised, out="bf16")])
    return ", ".join([f"{dims} {signature.dtype} {signature.mask}", *scales, *features(signature)])


def as_code(config) -> str:
    """The expression that makes it, without what is the default."""
    named = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.default is MISSING or value != field.default:
            named.append(f"{field.name}={value!r}")
    return f"{type(config).__name__}({', '.join(named)})"
