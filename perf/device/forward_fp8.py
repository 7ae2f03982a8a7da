"""The forward pass of one-byte inputs: every row of their tuning table."""

import functools
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from fa3.call.scales import num_blocks
from fa3.kernels.config import SMEM_LIMIT, FwdConfig
from fa3.kernels.signature import Signature

from .. import check, variants
from ..cases import DTYPES, FORWARD_FP8
from .forward import STAGES, Forward, NamedByCases, with_other_schedule
from .small import K_BLOCK, Q_BLOCK, Small

TILE_N = (64, 128)  # a tile lies within one scale of v
O_SLICES = (0, 64, 128)
SPARE_REGISTERS = 8  # the estimate below is high: slices of P V come and go


class ForwardFp8(Forward):
    """A row of passes.PASSES."""

    name = FORWARD_FP8
    tests = (
        "tests/test_fp8.py",
        "tests/test_fp8_accuracy.py",
        "tests/test_fp8_op.py",
        "tests/test_fp8_problem.py",
    )
    sanitized = (
        Small("e4m3", 128, 128, 200, 333, causal=True, scales="block"),
        Small("e4m3", 64, 64, 257, 300, scales="head"),
        Small("e4m3", 256, 256, 130, 200, window=(30, 20), scales="block"),
        Small("int8", 192, 128, 150, 260, causal=True, scales="block"),
    )
    repeated = (
        Small("e4m3", 128, 128, 2048, 2048, True, batch=4, h_q=16, h_k=4, scales="block"),
        Small("e4m3", 128, 128, 1999, 2111, batch=2, h_q=16, h_k=16, scales="head"),
        Small("int8", 64, 64, 4096, 4096, True, batch=2, h_q=16, h_k=16, scales="block"),
        Small("e4m3", 256, 256, 1500, 1700, False, (500, 100), 2, 8, 8, scales="block"),
    )
    first_calls = (Small("e4m3", 128, 128, 128, 128, causal=True, scales="block"),)

    def signatures(self) -> list[Signature]:
        return variants.one_byte()

    def candidates(self, signature: Signature) -> list[FwdConfig]:
        shipped, dv = self.config(signature), signature.head_dim_v
        found = [shipped, with_other_schedule(shipped, signature)]
        for tile_n, warpgroups, stages, o_slice in product(TILE_N, (2, 3), STAGES, O_SLICES):
            if o_slice >= dv or (o_slice and dv % o_slice):
                continue
            config = FwdConfig(tile_n, warpgroups, stages, o_slice)
            # of a thread: S, O and P V in fp32, two slices of the last where it is cut; P in bytes
            columns = tile_n + dv + (2 * o_slice or dv)
            registers = columns // 2 + tile_n // 8
            fits = config.smem_bytes(signature) <= SMEM_LIMIT
            roomy = registers + SPARE_REGISTERS <= config.consumer_registers
            if fits and roomy and config != shipped:
                found.append(config)
        return found

    def draw(self, signature: Signature, batch: int, length: int, heads: int, device):
        """Random codes and scales per block."""
        torch.manual_seed(0)
        widths = signature.head_dim, signature.head_dim, signature.head_dim_v
        values = [torch.randn(batch, length, heads, d, device=device) for d in widths]
        codes = [x.to(DTYPES["e4m3"]) for x in values]
        counts = [num_blocks(length, rows) for rows in (Q_BLOCK, K_BLOCK, K_BLOCK)]
        return [*codes, *(torch.rand(batch, heads, n, device=device) / 2 + 0.5 for n in counts)]

    @functools.cached_property
    def smalls(self) -> list[Small]:
        """Those of 16 bits, with scales of both forms; some with int8 scores."""
        cases = []
        for i, case in enumerate(super().smalls):
            dtype, scales = ("e4m3" if i % 6 else "int8"), ("block", "head")[i % 2]
            cases.append(replace(case, dtype=dtype, scales=scales))
        return cases


class OneCall(NamedByCases, Forward):
    """fa3.flash_attn_fp8_func: the kernels that quantise, and those of ForwardFp8."""

    name = "quantise"
    tests = ("tests/test_quantize.py",)
    sanitized = (
        Small("bf16", 128, 128, 200, 333, causal=True),
        Small("fp16", 64, 64, 257, 300),
    )
    repeated = (Small("bf16", 128, 128, 2048, 2048, True, batch=4, h_q=16, h_k=4),)
    first_calls = (Small("bf16", 128, 128, 128, 128, causal=True),)
    limits = dict.fromkeys(("bf16", "fp16"), check.ROW_ERROR["e4m3"])
    smalls = (
        Small("bf16", 128, 128, 130, 300, causal=True, seed=1),
        Small("fp16", 64, 64, 257, 150, seed=2),
        Small("bf16", 256, 256, 97, 200, window=(50, 9), seed=3),
    )

    def call(self, case: Small, inputs) -> dict[str, Tensor]:
        import fa3

        options = {"causal": case.causal, "window_size": case.window}
        out, lse = fa3.flash_attn_fp8_func(*inputs, **options, return_attn_probs=True)
        return {"out": out, "lse": lse}
