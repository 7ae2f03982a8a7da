"""The DSL's types of elements, by the names that a Signature has for them."""

from dataclasses import dataclass, replace

import cutlass
from cutlass import Float32

from .signature import Signature

ELEMENT = {
    "bf16": cutlass.BFloat16,
    "fp16": cutlass.Float16,
    "fp32": cutlass.Float32,
    "e4m3": cutlass.Float8E4M3FN,
    "e5m2": cutlass.Float8E5M2,
    "int8": cutlass.Int8,
}


@dataclass(frozen=True)
class Elements:
    """Element types of the operands and of the output."""

    q: type
    k: type
    p: type
    v: type
    out: type
    scores: type  # of the accumulator of Q K^T

    @staticmethod
    def in_memory(signature: Signature) -> "Elements":
        """The same with K and V as TMA brings them."""
        elements = Elements.of(signature)
        if signature.widens is None:
            return elements
        return replace(elements, k=ELEMENT[signature.widens], v=ELEMENT[signature.widens])

    @staticmethod
    def of(signature: Signature) -> "Elements":
        q, quantised = ELEMENT[signature.dtype], signature.quantised
        if quantised is None:
            return Elements(q, q, q, q, Float32 if signature.is_split else q, Float32)
        k, v = ELEMENT[quantised.k], ELEMENT[quantised.v]
        scores = cutlass.Int32 if q is cutlass.Int8 else Float32
        return Elements(q, k, cutlass.Float8E4M3FN, v, ELEMENT[quantised.out], scores)
