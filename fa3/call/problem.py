"""Problem: one attention call, checked once, its facts named once.

Every check that needs no pointer is here and works on `Layout`s alone, so that it can be cached,
runs on fake tensors and is tested without memory. Each message names the argument and both values.
"""

import math
from dataclasses import dataclass

import torch

from ..kernels.signature import (
    HEAD_DIM_TILES,
    UNBOUNDED,
    Quantised,
    Signature,
    head_dim_tile,
)
from .hints import ORDER, PACKED
from .layout import (
    ALIGNMENT,
    MAX_STRIDE,
    Layout,
    check_last_stride,
    check_like,
    odd_dimension,
)
from .lengths import EQUAL, Lengths, Sequences, in_rows
from .mask import MaskSpec
from .options import Options
from .scales import NO_DESCALES, CacheScales, Descales, Scales, named

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
BYTE_DTYPES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}
OUT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WIDENED_DTYPES = (torch.float8_e4m3fn,)  # of k and v beside 16-bit q
# dtype of q -> those that k and v may have
K_DTYPES = {
    torch.float16: (torch.float16, *WIDENED_DTYPES),
    torch.bfloat16: (torch.bfloat16, *WIDENED_DTYPES),
    torch.float8_e4m3fn: (torch.float8_e4m3fn, torch.float8_e5m2),
    torch.int8: (torch.int8,),
}
SINK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
V_DTYPES = {**K_DTYPES, torch.int8: K_DTYPES[torch.float8_e4m3fn]}
MAX_HEAD_DIM = HEAD_DIM_TILES[-1]
# Positions are int32 in the kernel: tiles may reach past the length, a window is added on top.
MAX_LENGTH = 2**31 - 1024
MAX_LENGTH_LOCAL = UNBOUNDED - 1024
LOG2_E = math.log2(math.e)
FP32 = torch.finfo(torch.float32)
# Of softmax_scale and softcap: what fp32 holds without loss after the change to base 2.
SCALES = (FP32.tiny / LOG2_E, FP32.max / LOG2_E)

SHAPES = {"q": "(batch, s_q, h_q, d)", "k": "(batch, s_k, h_k, d)", "v": "(batch, s_k, h_k, dv)"}
PACKED_SHAPES = {"q": "(total_q, h_q, d)", "k": "(total_k, h_k, d)", "v": "(total_k, h_k, dv)"}


@dataclass(frozen=True)
class Problem:
    """q (batch, s_q, h_q, d), k (batch, s_k, h_k, d), v (batch, s_k, h_k, dv).

    Packed tensors have no dimension for the batch, and s_q and s_k are the rows of all sequences.
    Of pages s_k is what those of a sequence hold.
    """

    sequences: Sequences
    s_q: int
    s_k: int
    h_q: int
    h_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype  # of q
    k_dtype: torch.dtype
    v_dtype: torch.dtype
    out_dtype: torch.dtype
    device: torch.device
    scales: Scales | CacheScales | None  # for one-byte inputs, of k and v alone or of all
    softmax_scale: float
    mask: MaskSpec
    sm_margin: int
    softcap: float  # 0: none
    has_sink: bool
    rows_per_query: int

    @classmethod
    def of(
        cls,
        q: Layout,
        k: Layout,
        v: Layout,
        options: Options,
        descales: Descales = NO_DESCALES,
        out_dtype: torch.dtype | None = None,
        lengths: Lengths = EQUAL,
        learnable_sink: Layout | None = None,
    ) -> "Problem":
        """Check everything that does not depend on strides or addresses.

        out_dtype: of the result of one-byte inputs, by default bf16; that of 16-bit ones is q's.

        Raises:
            TypeError: a dtype is not supported.
            ValueError: anything else; nothing has been launched.
        """
        _check_types(q, k, v)
        k, v = in_rows(q, k, v, lengths)
        _check_shapes(q, k, v, lengths)
        sequences = Sequences.of(q, k, lengths)
        s_q, h_q, head_dim = q.shape[-3:]
        s_k, h_k, head_dim_v = v.shape[-3:]
        mask = MaskSpec.of(options.causal, options.window_left, options.window_right)
        for name, length in (("q", s_q), ("k", s_k)):
            limit = MAX_LENGTH_LOCAL if mask.kind == "local" else MAX_LENGTH
            if length > limit:
                raise ValueError(
                    f"{name} has length {length}, over the limit of {limit} (mask {mask.kind})"
                )
        return cls(
            sequences,
            s_q,
            s_k,
            h_q,
            h_k,
            head_dim,
            head_dim_v,
            q.dtype,
            k.dtype,
            v.dtype,
            _out_dtype_of(q.dtype, out_dtype),
            q.device,
            _scales_of(q, k, v, descales, sequences, lengths),
            _scale_of(options.softmax_scale, head_dim),
            mask,
            _margin_of(options.sm_margin),
            _softcap_of(options.softcap),
            _has_sink(learnable_sink, q, sequences.batch),
            _rows_per_query_of(options.rows_per_query, s_q),
        )

    @property
    def signature(self) -> Signature:
        """The part of the problem that a kernel is compiled for."""
        dtype = (DTYPES | BYTE_DTYPES)[self.dtype]
        tiles = head_dim_tile(self.head_dim), head_dim_tile(self.head_dim_v)
        more = {"score": "softcap" if self.softcap else None, "sinks": self.has_sink}
        if self.sequences.page_size:
            more["page_rows"] = self.sequences.page_rows
        more["packs_heads"] = self.given_rows_per_query is not None
        if self.widens:
            more["widens"] = BYTE_DTYPES[self.k_dtype]
        return Signature(
            dtype, *tiles, self.mask.kind, self._quantised, self.sequences.is_ragged, **more
        )

    @property
    def _quantised(self) -> Quantised | None:
        if self.dtype in DTYPES:
            return None
        return Quantised(
            BYTE_DTYPES[self.k_dtype],
            BYTE_DTYPES[self.v_dtype],
            OUT_DTYPES[self.out_dtype],
            k_block=self.scales.k.block,
            v_block=self.scales.v.block,
        )

    @property
    def widens(self) -> bool:
        """k and v have one byte, q has two."""
        return self.dtype in DTYPES and self.k_dtype in BYTE_DTYPES

    @property
    def batch(self) -> int:
        return self.sequences.batch

    @property
    def scalars(self) -> tuple:
        """The last fields of FwdArguments, but for num_ctas."""
        scale = self.softmax_scale * LOG2_E
        if self.softcap:  # what fp32 does not hold caps every score that is not 0, or none
            scale = min(max(scale * (2 / self.softcap), FP32.tiny), FP32.max)
        num_sequences = self.batch if self.sequences.is_ragged else None
        return num_sequences, scale, self.softcap * LOG2_E, self.mask.left, self.mask.right

    @property
    def given_rows_per_query(self) -> int | None:
        """The last field of FwdArguments: None where each row is a query, or it makes no odds."""
        return self.rows_per_query if self.rows_per_query > 1 and self.mask.kind != "full" else None

    @property
    def out_shape(self) -> tuple[int, ...]:
        shape = self.s_q, self.h_q, self.head_dim_v
        return shape if self.sequences.q_is_packed else (self.batch, *shape)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        shape = self.h_q, self.s_q
        return shape if self.sequences.q_is_packed else (self.batch, *shape)

    @property
    def is_empty(self) -> bool:
        """There is no query, hence no output."""
        return self.batch == 0 or self.s_q == 0 or self.h_q == 0


def check_out(out: Layout, problem: Problem) -> None:
    """The result must fit the tensor that the caller brought, element by element."""
    check_like("out", out, problem.out_shape, problem.out_dtype, problem.device)
    check_last_stride("out", out)
    if 0 not in out.shape and (dim := odd_dimension(out)) is not None:
        size = out.dtype.itemsize
        raise ValueError(
            f"out has stride {out.stride[dim]} in dimension {dim}, that is "
            f"{out.stride[dim] * size} bytes, expected a multiple of {ALIGNMENT} bytes below "
            f"{MAX_STRIDE}"
        )
    ordered = sorted((step, n) for step, n in zip(out.stride, out.shape, strict=True) if n > 1)
    reach = 0
    for step, n in ordered:
        if step <= reach:
            raise ValueError(
                f"out has strides {tuple(out.stride)} for shape {tuple(out.shape)}, "
                "so that some of its elements share memory"
            )
        reach += step * (n - 1)


def _check_types(q: Layout, k: Layout, v: Layout) -> None:
    if q.dtype not in K_DTYPES:
        raise TypeError(f"q has dtype {q.dtype}, expected {_either(K_DTYPES)}")
    if q.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"q is on device {q.device}, expected cuda or cpu")
    for name, layout, allowed in (("k", k, K_DTYPES[q.dtype]), ("v", v, V_DTYPES[q.dtype])):
        if layout.dtype not in allowed:
            raise TypeError(
                f"{name} has dtype {layout.dtype} but q has {q.dtype}, expected {_either(allowed)}"
            )
        if layout.device != q.device:
            raise ValueError(f"{name} is on device {layout.device} but q is on {q.device}")
    if q.dtype in DTYPES and v.dtype != k.dtype:
        raise TypeError(
            f"v has dtype {v.dtype} but k has {k.dtype}, expected the same beside {q.dtype}"
        )


def _either(dtypes) -> str:
    *others, last = map(str, dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def _scales_of(
    q: Layout,
    k: Layout,
    v: Layout,
    descales: Descales,
    sequences: Sequences,
    lengths: Lengths,
) -> Scales | CacheScales | None:
    if q.dtype in BYTE_DTYPES:
        scales = Scales.of(q, v, descales, sequences)
        for name, block in (("k_descale", scales.k.block), ("v_descale", scales.v.block)):
            if block and lengths.cache_leftpad is not None:
                raise NotImplementedError(
                    f"{name} has a scale per {block} keys beside cache_leftpad, expected one per "
                    "head: blocks of keys would not begin with a sequence"
                )
        return scales
    if k.dtype in BYTE_DTYPES:
        return CacheScales.of(q, k, descales, sequences.batch)
    if descales == NO_DESCALES:
        return None
    name = next(iter(named(descales)))
    raise ValueError(
        f"{name} is a tensor but q has dtype {q.dtype}, expected None: "
        "only one-byte inputs have scales"
    )


def _out_dtype_of(dtype: torch.dtype, out_dtype: torch.dtype | None) -> torch.dtype:
    if dtype in DTYPES:
        return dtype
    if out_dtype is None:
        return torch.bfloat16
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out has dtype {out_dtype}, expected {_either(OUT_DTYPES)}")
    return out_dtype


def _check_shapes(q: Layout, k: Layout, v: Layout, lengths: Lengths) -> None:
    layouts = {"q": q, "k": k, "v": v}
    _check_ranks(layouts, lengths)
    for what, name, dim, other in (
        ("batch", "k", -4, "q"),
        ("batch", "v", -4, "q"),
        ("batch", "v", -4, "k"),
        ("length", "v", -3, "k"),
        ("number of heads", "v", -2, "k"),
        ("head dim", "k", -1, "q"),
    ):
        shape, wanted = layouts[name].shape, layouts[other].shape
        if min(len(shape), len(wanted)) + dim >= 0 and shape[dim] != wanted[dim]:
            raise ValueError(
                f"{name} has {what} {shape[dim]} but {other} has {wanted[dim]} "
                f"(dimension {len(shape) + dim})"
            )
    unit = ALIGNMENT // k.dtype.itemsize  # which has at most as many bytes as q
    for name, layout in (("q", q), ("v", v)):
        d = layout.shape[-1]
        if d <= 0 or d > MAX_HEAD_DIM or d % unit:
            raise ValueError(
                f"{name} has head dim {d}, expected a multiple of {unit} from {unit} to "
                f"{MAX_HEAD_DIM} for {layout.dtype}"
            )
    h_q, h_k = q.shape[-2], k.shape[-2]
    if (h_k == 0 and h_q > 0) or (h_k > 0 and h_q % h_k):
        raise ValueError(f"q has {h_q} heads, expected a multiple of the {h_k} heads of k")


def _check_ranks(layouts: dict[str, Layout], lengths: Lengths) -> None:
    packed = {
        "q": lengths.cu_seqlens_q is not None,
        "k": lengths.cu_seqlens_k is not None,
        "v": lengths.cu_seqlens_k is not None,
    }
    for name, layout in layouts.items():
        shape = (PACKED_SHAPES if packed[name] else SHAPES)[name]
        rank = 3 if packed[name] else 4
        if len(layout.shape) != rank:
            given = f"cu_seqlens_{'q' if name == 'q' else 'k'}"
            why = (
                f" with {given}"
                if packed[name]
                else f" without {given}"
                if lengths != EQUAL
                else ""
            )
            hint = "" if lengths != EQUAL or len(layout.shape) != 3 else f"; {PACKED}"
            raise ValueError(
                f"{name} has {len(layout.shape)} dimensions, {tuple(layout.shape)}, "
                f"expected {rank}{why}: {shape}{hint}"
            )


def _scale_of(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    smallest, largest = SCALES
    if not smallest <= softmax_scale <= largest:  # NaN is not
        why = "scores are multiplied by it in fp32" if softmax_scale else ORDER
        raise ValueError(
            f"softmax_scale is {softmax_scale}, expected a number from {smallest:.3g} to "
            f"{largest:.3g}: {why}"
        )
    return float(softmax_scale)


def _softcap_of(softcap: float) -> float:
    smallest, largest = SCALES
    if softcap != 0 and not smallest <= softcap <= largest / 2:  # NaN is not; twice it is a factor
        raise ValueError(
            f"softcap is {softcap}, expected 0 for none, or a number from {smallest:.3g} to "
            f"{largest / 2:.3g}: scores are compared with it in fp32"
        )
    return float(softcap)


def _has_sink(sink: Layout | None, q: Layout, batch: int) -> bool:
    if sink is None:
        return False
    h_q = q.shape[-2]
    if sink.dtype not in SINK_DTYPES:
        raise TypeError(f"learnable_sink has dtype {sink.dtype}, expected {_either(SINK_DTYPES)}")
    if sink.device != q.device:
        raise ValueError(f"learnable_sink is on device {sink.device} but q is on {q.device}")
    if tuple(sink.shape) not in ((h_q,), (batch, h_q)):
        raise ValueError(
            f"learnable_sink has shape {tuple(sink.shape)}, expected {(h_q,)}, one for each head "
            f"of q, or {(batch, h_q)}"
        )
    return True


def _rows_per_query_of(number: int, s_q: int) -> int:
    if number < 1 or s_q % number:
        raise ValueError(f"rows_per_query is {number}, expected a divisor of the {s_q} rows of q")
    return number


def _margin_of(sm_margin: int) -> int:
    if sm_margin < 0:
        raise ValueError(f"sm_margin is {sm_margin}, expected at least 0")
    return sm_margin
