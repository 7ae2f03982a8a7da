"""`python -m perf.stubs`: writes the types of the public functions, `fa3/interface*.pyi`.

A result is one tensor or a pair, as a flag says, which takes overloads: three copies of each
signature, which nobody should have to keep by hand.
"""

import argparse
import inspect
from pathlib import Path

import torch

from fa3 import interface, interface_cache, interface_fp8

MODULES = interface, interface_cache, interface_fp8
FLAGS = ("return_attn_probs", "return_softmax_lse")  # a pair is returned
HEAD = '''"""Types for type checkers, written by `python -m perf.stubs`."""

from collections.abc import Sequence
from typing import Literal, overload
'''
# Where the default does not tell the type.
TYPES = {
    "softmax_scale": "float | Tensor | None",
    "softcap": "float | Tensor",
    "window_size": "Sequence[int]",
    "pack_gqa": "bool | None",
    "smooth_k": "bool | None",
    "qk_dtype": "torch.dtype",
    **dict.fromkeys(("num_heads_q", "max_seqlen_q", "max_seqlen_k"), "int | None"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "Tensor | None"),
    "cache_seqlens": "Tensor | int | None",
}


def stub(module) -> str:
    """The text of a module's stub, as ruff formats it."""
    functions = [
        x
        for name, x in vars(module).items()
        if name.startswith("flash_attn") and x.__module__ == module.__name__
    ]
    overloads = [_overload(function, kind) for function in functions for kind in KINDS]
    imports = "\n".join(
        line
        for line, word in (("import torch", "torch.dtype"), ("from torch import Tensor", "Tensor"))
        if any(word in x for x in overloads)
    )
    return "\n".join((HEAD, imports, "", *overloads, ""))


KINDS = {
    "Literal[False]": "Tensor",
    "Literal[True]": "tuple[Tensor, Tensor]",
    "bool": "Tensor | tuple[Tensor, Tensor]",
}


def _overload(function, kind: str) -> str:
    """With a flag of this type."""
    lines, in_keywords = [], False
    for x in inspect.signature(function).parameters.values():
        is_required_flag = x.name in FLAGS and kind == "Literal[True]"
        if not in_keywords and (x.kind is x.KEYWORD_ONLY or is_required_flag):
            lines.append("*")
            in_keywords = True
        if is_required_flag:
            lines.append(f"{x.name}: {kind}")
        else:
            lines.append(f"{x.name}: {kind if x.name in FLAGS else _type(x)}{_default(x)}")
    body = "".join(f"    {line},\n" for line in lines)
    return f"@overload\ndef {function.__name__}(\n{body}) -> {KINDS[kind]}: ..."


def _type(x: inspect.Parameter) -> str:
    if x.name in TYPES and not isinstance(x.default, bool):
        return TYPES[x.name]
    if x.default is x.empty:
        return "Tensor"
    return "Tensor | None" if x.default is None else type(x.default).__name__


def _default(x: inspect.Parameter) -> str:
    if x.default is x.empty:
        return ""
    return f" = {'...' if isinstance(x.default, torch.dtype) else repr(x.default)}"


def path_of(module) -> Path:
    return Path(module.__file__).with_suffix(".pyi")


def main() -> None:
    argparse.ArgumentParser(prog="python -m perf.stubs", description=__doc__).parse_args()
    for module in MODULES:
        path_of(module).write_text(stub(module))
        print(path_of(module))


if __name__ == "__main__":
    main()
