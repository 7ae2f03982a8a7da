"""How q, k and v are quantised: options, recipes, and the kernels of a layout."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .call.layout import ALIGNMENT, Layout, check_last_stride, odd_dimension, tma_strides
from .call.lengths import Lengths
from .call.options import Options, bool_of, int_of
from .call.problem import BYTE_DTYPES, DTYPES, Problem
from .kernels.quantize_signature import CHUNK, QuantizeConfig, QuantizeSignature, ScaleMode
from .kernels.signature import Q_BLOCK
from .launch import dispatch, jit
from .reference import quantize as quantize_reference
from .segments import Segments

KERNEL = "fa3.kernels.quantize:Quantize"


class QuantizeOptions(NamedTuple):
    """The options of quantize_fp8, in the operator's order."""

    hadamard: bool
    smooth_k: bool
    smooth_v: bool
    block_scales: bool
    v_per_channel: bool
    rows_per_block: int
    qk_dtype: torch.dtype
    v_dtype: torch.dtype

    @classmethod
    def of(cls, *given) -> "QuantizeOptions":
        """Checked, and as the operator takes them."""
        given = dict(zip(cls._fields, given, strict=True))
        for name in ("hadamard", "smooth_k", "smooth_v", "block_scales", "v_per_channel"):
            given[name] = bool_of(name, given[name])
        given["rows_per_block"] = rows = int_of("rows_per_block", given["rows_per_block"])
        if rows not in (64, 128):
            raise ValueError(f"rows_per_block is {rows}, expected 64 or 128")
        for name, allowed in (
            ("qk_dtype", (torch.float8_e4m3fn, torch.int8)),
            ("v_dtype", (torch.float8_e4m3fn, torch.float8_e5m2)),
        ):
            if given[name] not in allowed:
                raise TypeError(f"{name} is {given[name]!r}, expected {allowed[0]} or {allowed[1]}")
        return cls(**given)

    def recipes(self, h_k: int) -> dict[str, "Recipe"]:
        """For q, k and v."""
        form = "block" if self.block_scales else "head"
        v_form = "channel" if self.v_per_channel else form
        rows, qk = self.rows_per_block, self.qk_dtype
        return {
            "q": Recipe(qk, form, Q_BLOCK, h_k, self.hadamard),
            "k": Recipe(qk, form, rows, h_k, self.hadamard),
            "v": Recipe(self.v_dtype, v_form, rows, h_k, False),
        }


class Recipe(NamedTuple):
    """How one tensor (b, s, h, d) or (total, h, d) is quantised."""

    dtype: torch.dtype
    form: Literal["block", "head", "channel"]  # what has a scale of its own
    rows: int  # of a block
    h_k: int
    hadamard: bool

    def descale_shape(self, shape: Sequence[int], segments: Segments) -> tuple[int, ...]:
        h, d = shape[-2:]
        if self.form == "block":
            entries, count = segments.blocks(self.rows)
            return entries, h, count
        return (segments.batch, self.h_k) if self.form == "head" else (segments.batch, h, 1, d)

    def signature(self, layout: Layout, scales: ScaleMode, **more: bool) -> QuantizeSignature:
        names = DTYPES[layout.dtype], BYTE_DTYPES[self.dtype]
        d = layout.shape[-1]
        return QuantizeSignature(*names, d, self.rows, scales, self.hadamard, **more)

    def signature_of_sums(self, layout: Layout) -> QuantizeSignature:
        """Of its rows as they come."""
        d = layout.shape[-1]
        return QuantizeSignature(DTYPES[layout.dtype], "e4m3", d, self.rows, "sum", is_ragged=True)


class Plan(NamedTuple):
    """How one tensor is quantised: everything but where it and its sequences lie."""

    recipe: Recipe
    copy: bool  # its strides are no multiples of 16 bytes
    strides: tuple[int, ...] | None  # to read it by, where only dimensions of size 1 are odd
    # Kernels, which take x, y, scales, mean, dot, errors and Segments.arguments:
    amax: Callable | None  # where not blocks have scales
    cast: Callable
    sums: Callable | None  # where a mean of ragged sequences is needed

    def readable(self, x: Tensor) -> Tensor:
        if self.copy or x.data_ptr() % ALIGNMENT:
            return x.clone(memory_format=torch.contiguous_format)
        return x if self.strides is None else x.as_strided(x.shape, self.strides)


@functools.lru_cache(maxsize=4096)
def plans_of(  # noqa: PLR0913
    q, k, v, given: Lengths, options: QuantizeOptions, target: dispatch.Target | None
) -> tuple[Plan, ...]:
    """Check a call and find its kernels; the cache makes this free for layouts seen before."""
    q, k, v = (Layout(*x) for x in (q, k, v))
    check_layouts(q, k, v, options, given)
    recipes = options.recipes(k.shape[-2])
    q_is_ragged = given.cu_seqlens_q is not None or given.seqused_q is not None
    k_is_ragged = given.cu_seqlens_k is not None or given.seqused_k is not None
    smooth_k, smooth_v = options.smooth_k, options.smooth_v
    return (
        _plan(recipes["q"], q, target, q_is_ragged, dot_with_mean=smooth_k),
        _plan(recipes["k"], k, target, k_is_ragged, smooth_k),
        _plan(recipes["v"], v, target, k_is_ragged, smooth_v, sum_errors=smooth_v),
    )


def _plan(  # noqa: PLR0913
    recipe: Recipe, layout: Layout, target, is_ragged: bool, subtract_mean=False, **of_cast: bool
) -> Plan:
    target = None if 0 in layout.shape else target

    def kernel(scales, **more):
        more |= {"subtract_mean": subtract_mean, "is_ragged": is_ragged}
        return _kernel(recipe.signature(layout, scales, **more), target)

    is_block = recipe.form == "block"
    needs_sums = is_ragged and subtract_mean
    return Plan(
        recipe,
        odd_dimension(layout) is not None,
        tma_strides(layout),
        None if is_block else kernel("amax"),
        kernel("block" if is_block else "given", **of_cast),
        _kernel(recipe.signature_of_sums(layout), target) if needs_sums else None,
    )


def _kernel(signature: QuantizeSignature, target: dispatch.Target | None) -> Callable:
    """The function run(x, y, scales, mean, dot, errors, cu_seqlens, seqused, num_blocks)."""
    if target is None:
        return _do_nothing
    if target.kind == "reference":
        return quantize_reference.bind(signature)
    if target.capability[0] != 9:
        major, minor = target.capability
        raise NotImplementedError(
            f"quantize_fp8 needs compute capability 9.x, {target.name} has {major}.{minor}: "
            "give the 16-bit tensors to flash_attn_func"
        )
    return jit.compile(KERNEL, signature, QuantizeConfig(), target.kind)


def _do_nothing(*arguments):
    pass


def check_layouts(
    q: Layout, k: Layout, v: Layout, options: QuantizeOptions, given: Lengths
) -> None:
    """Raises TypeError or ValueError; nothing has been launched."""
    if q.dtype not in DTYPES:
        raise TypeError(f"q has dtype {q.dtype}, expected torch.float16 or torch.bfloat16")
    for name, layout in (("k", k), ("v", v)):
        if layout.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {layout.dtype}, expected {q.dtype}, that of q")
    problem = Problem.of(q, k, v, Options(), lengths=given)
    for name, layout in (("q", q), ("k", k), ("v", v)):
        check_last_stride(name, layout)
    for name, d in (("q", problem.head_dim), ("v", problem.head_dim_v)):
        if d % CHUNK:
            raise ValueError(f"{name} has head dim {d}, expected a multiple of {CHUNK}")
    d = problem.head_dim
    if options.hadamard and d & (d - 1):
        raise ValueError(f"q has head dim {d}, expected a power of two with hadamard=True")
