"""PASSES: what every step runs over. A new kernel or pass is one more row.

A row names its kernels (signatures), their configs, its small problems and its tests; the steps
know nothing else of it.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fa3 import dispatch, jit, ops, tuning
from fa3.kernels.config import SMEM_LIMIT, FwdConfig
from fa3.kernels.signature import Signature
from fa3.problem import Layout, Options, Problem

from ..cases import DTYPES, FORWARD

SIXTEEN_BIT = ("bf16", "fp16")
MASKS = ("full", "causal", "local")
TILE_N = {
    64: (112, 128, 160, 192),
    96: (112, 128, 144, 176),
    128: (96, 112, 128, 144, 160, 176, 192),
    192: (64, 80, 96, 112, 128),
    256: (48, 64, 80, 96),
}
STAGES = (2, 3, 4)
SPARE_REGISTERS = 24  # of a consumer thread, besides S, P and O


@dataclass(frozen=True)
class Small:
    """A problem whose inputs are the same numbers on every machine: they come from the seed.

    q (batch, s_q, h_q, head_dim), k (batch, s_k, h_k, head_dim), v (batch, s_k, h_k, head_dim_v)
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    s_q: int
    s_k: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    batch: int = 1
    h_q: int = 2
    h_k: int = 1
    seed: int = 0

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full" if self.window == (-1, -1) else "local"
        dims = f"d{self.head_dim}" + f"/{self.head_dim_v}" * (self.head_dim != self.head_dim_v)
        return f"{self.dtype} {dims} {mask} {self.s_q}x{self.s_k} h{self.h_q}/{self.h_k}"

    def inputs(self, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Sums of four integers over 128: nearly normal, and free of any rounding but the dtype's.

        They are drawn on the CPU, so that no other kernel runs on the device.
        """
        draw = np.random.RandomState(self.seed)  # its stream is frozen

        def tensor(*shape):
            whole = draw.randint(-128, 128, size=(4, *shape)).sum(0)
            values = torch.from_numpy(whole.astype(np.float32) / 128)
            return values.to(DTYPES[self.dtype]).to(device)

        return (
            tensor(self.batch, self.s_q, self.h_q, self.head_dim),
            tensor(self.batch, self.s_k, self.h_k, self.head_dim),
            tensor(self.batch, self.s_k, self.h_k, self.head_dim_v),
        )


def digest(tensors) -> str:
    """Of the bits of 16-bit tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]


class Forward:
    """The forward pass: 16-bit, every row of the tuning table."""

    name = FORWARD
    tests = (
        "tests/test_forward.py",
        "tests/test_torch_op.py",
        "tests/test_transformers.py",
        "tests/golden",
    )
    # of the sanitizers: one small case per tile of head dims, every mask among them
    sanitized = (
        Small("bf16", 128, 128, 200, 333, causal=True),
        Small("fp16", 64, 64, 257, 300),
        Small("bf16", 256, 256, 130, 200, window=(30, 20)),
        Small("bf16", 192, 128, 150, 260, causal=True),
    )
    # of the test of repeatability: the same bits every time; full grids and odd ends
    repeated = (
        Small("bf16", 128, 128, 2048, 2048, True, batch=4, h_q=16, h_k=4),
        Small("fp16", 128, 128, 1999, 2111, batch=2, h_q=16, h_k=16),
        Small("bf16", 64, 64, 4096, 4096, True, batch=2, h_q=16, h_k=16),
        Small("bf16", 256, 256, 1500, 1700, window=(500, 100), batch=2, h_q=8, h_k=8),
    )
    # cold and warm compile times are taken of these
    first_calls = (
        Small("bf16", 128, 128, 128, 128, causal=True),
        Small("bf16", 64, 64, 128, 128),
    )

    def signatures(self) -> list[Signature]:
        """Every kernel that a call can get."""
        return [
            Signature(t, *d, m) for d in sorted(tuning.FORWARD) for t in SIXTEEN_BIT for m in MASKS
        ]

    def tuned(self) -> list[Signature]:
        """What the tuning step looks at."""
        return [Signature("bf16", *d, m) for d in sorted(tuning.FORWARD) for m in MASKS[:2]]

    def config(self, signature: Signature) -> FwdConfig:
        return tuning.forward(signature)

    def candidates(self, signature: Signature) -> list[FwdConfig]:
        """The shipped config first; then all that shared memory and registers allow."""
        shipped = self.config(signature)
        widest = max(signature.head_dim, signature.head_dim_v)
        found = [shipped]
        for tile_n, stages, warpgroups in itertools.product(TILE_N[widest], STAGES, (2, 3)):
            config = FwdConfig(tile_n, warpgroups, stages)
            # fp32 S and O, 16-bit P: a thread of 128 holds that share of 64 rows
            registers = (4 * tile_n + 4 * signature.head_dim_v + 2 * tile_n) // 8
            fits = config.smem_bytes(signature) <= SMEM_LIMIT
            roomy = registers + SPARE_REGISTERS <= config.consumer_registers
            if fits and roomy and config != shipped:
                found.append(config)
        return found

    def compile(self, signature: Signature, config: FwdConfig) -> None:
        """Into the cache on disk; launches nothing."""
        kernel = dispatch.forward(signature, HOPPER)
        jit.artifacts(kernel.where, signature, config)

    def call(self, case: Small, inputs) -> dict[str, Tensor]:
        """What a user gets: name -> output."""
        import fa3

        out, lse = fa3.flash_attn_func(
            *inputs, causal=case.causal, window_size=case.window, return_attn_probs=True
        )
        return {"out": out, "lse": lse}

    def bind(self, config: FwdConfig, causal: bool, q, k, v) -> Callable[[], Tensor]:
        """A call with another config than the table's."""
        problem = Problem.of(Layout.of(q), Layout.of(k), Layout.of(v), Options(causal=causal))
        target = dispatch.target_of(q.device)
        kernel = dispatch.forward(problem.signature, target)
        run = jit.compile(kernel.where, problem.signature, config, target.kind)
        out = q.new_empty(*problem.out_shape)
        lse = q.new_empty(*problem.lse_shape, dtype=torch.float32)
        scale = problem.softmax_scale * ops.LOG2_E
        window = problem.window_left, problem.window_right

        def call() -> Tensor:
            run(q, k, v, out, lse, scale, *window, target.num_sms)
            return out

        return call

    @functools.cached_property
    def smalls(self) -> list[Small]:
        """What `perf.device.outputs` saves: every pair of head dims under every mask, twice."""
        lengths = ((130, 200), (70, 333), (200, 150), (1, 300), (97, 97))
        windows = {"full": (False, (-1, -1)), "causal": (True, (-1, -1)), "local": (False, (50, 9))}
        cases = []
        for dims, mask in itertools.product(sorted(tuning.FORWARD), MASKS):
            for turn in range(2):
                i = len(cases)
                causal, window = windows[mask]
                # alternating as in the accuracy tests, so that both compile the same kernels
                tiles = dims[0] // 32 + dims[1] // 64
                dtype = ("bf16", "fp16")[(tiles + MASKS.index(mask)) % 2]
                heads = ((2, 1), (2, 2))[turn]
                s_q, s_k = lengths[i % len(lengths)]
                case = Small(dtype, *dims, s_q, s_k, causal, window, 1, *heads, seed=i)
                cases.append(case)
        return cases


# a Hopper GPU as the dispatcher sees it, for what is compiled without one at hand
HOPPER = dispatch.Target("gpu", "sm_90a", (9, 0), dispatch.EMULATED_SMS)

PASSES = (Forward(),)
