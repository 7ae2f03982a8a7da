"""The kernels that this project ships, by Signature: what is compiled, inspected and listed."""

from dataclasses import MISSING, fields, replace
from itertools import product

from fa3.kernels.signature import Quantised, Signature
from fa3.launch import tuning

SIXTEEN_BIT = ("bf16", "fp16")
MASKS = ("full", "causal", "local")
# scales of one-byte inputs -> what they make of a kernel
QUANTISED = {
    "block scales": Quantised("e4m3", "e4m3", "bf16", k_block=128, v_block=128),
    "one scale": Quantised("e4m3", "e4m3", "bf16"),
    "int8 scores": Quantised("int8", "e4m3", "bf16", k_block=128, v_block=128),
}
KIND_OF = {quantised: kind for kind, quantised in QUANTISED.items()}


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


def shipped() -> list[Signature]:
    return sixteen_bit() + one_byte()


def is_main(signature: Signature) -> bool:
    """What most calls get: bf16, or e4m3 with scales per block."""
    quantised = signature.quantised
    return signature.dtype == "bf16" or quantised == QUANTISED["block scales"]


def name_of(signature: Signature) -> str:
    """Such as "128 bf16 full" or "192/128 e4m3 causal, block scales"."""
    dims = "/".join(map(str, dict.fromkeys((signature.head_dim, signature.head_dim_v))))
    quantised = signature.quantised
    scales = f", {KIND_OF[replace(quantised, out='bf16')]}" if quantised else ""
    score = f", {signature.score}" if signature.score else ""
    sinks = ", sinks" if signature.sinks else ""
    split = ", split" if signature.is_split else ""
    return f"{dims} {signature.dtype} {signature.mask}{scales}{score}{sinks}{split}"


def as_code(config) -> str:
    """The expression that makes it, without what is the default."""
    named = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.default is MISSING or value != field.default:
            named.append(f"{field.name}={value!r}")
    return f"{type(config).__name__}({', '.join(named)})"
