"""The forward pass, 16-bit: every row of the tuning table."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fa3.call.layout import Layout
from fa3.call.problem import Options, Problem
from fa3.call.scales import NO_DESCALES, Descales
from fa3.kernels.config import SMEM_LIMIT, FwdConfig
from fa3.kernels.signature import Signature
from fa3.launch import counters, dispatch, jit, tuning
from fa3.ops import NO_LENGTHS, WHOLE

from .. import check, variants
from ..cases import DTYPES, FORWARD
from .exact import Lengths, output_error
from .small import Small

TILE_N = {
    64: (112, 128, 160, 192),
    96: (112, 128, 144, 176),
    128: (96, 112, 128, 144, 160, 176, 192),
    192: (64, 80, 96, 112, 128),
    256: (48, 64, 80, 96),
}
STAGES = (2, 3, 4)
SPARE_REGISTERS = 24  # of a consumer thread, besides S, P and O
LENGTHS = ((130, 200), (70, 333), (200, 150), (1, 300), (97, 97))
WINDOWS = {"full": (False, (-1, -1)), "causal": (True, (-1, -1)), "local": (False, (50, 9))}

# a Hopper GPU as the dispatcher sees it, for what is compiled without one at hand
HOPPER = dispatch.Target("gpu", "sm_90a", (9, 0), dispatch.EMULATED_SMS)


def with_other_schedule(config: FwdConfig, signature: Signature) -> FwdConfig:
    return replace(config, schedule="static" if config.is_dynamic(signature) else "dynamic")


class NamedByCases:
    """Of a row without kernels of its own: those are its that its cases call."""

    def signatures(self) -> list:
        return []

    def tuned(self) -> list:
        return []


def descales_of(inputs) -> dict[str, Tensor]:
    """Arguments: what follows q, k and v among the inputs of a `Small`."""
    return dict(zip(("q_descale", "k_descale", "v_descale"), inputs[3:], strict=False))


class Forward:
    """A row of passes.PASSES."""

    name = FORWARD
    target = HOPPER  # what its kernels are compiled for, where there is no GPU to ask
    limits = check.ROW_ERROR  # dtype -> what `error` may be
    context = contextlib.nullcontext  # what its calls are made in
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
        return variants.sixteen_bit()

    @property
    def cases(self) -> list[Small]:
        """All that a step calls."""
        return [*self.smalls, *self.sanitized, *self.repeated, *self.first_calls]

    def tuned(self) -> list[Signature]:
        """What the tuning step looks at."""
        return [s for s in self.signatures() if s.mask != "local" and variants.is_main(s)]

    def config(self, signature: Signature) -> FwdConfig:
        return tuning.forward(signature, self.target.capability)

    def candidates(self, signature: Signature) -> list[FwdConfig]:
        """The shipped config first, with either schedule, and with a cluster where it may have one;
        then all that shared memory and registers allow."""
        shipped = self.config(signature)
        widest = max(signature.head_dim, signature.head_dim_v)
        found = [shipped, with_other_schedule(shipped, signature)]
        if shipped.may_cluster(signature):
            found.append(replace(shipped, cluster=2))
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
        jit.artifacts(*self.key(signature, config))

    def key(self, signature: Signature, config: FwdConfig) -> tuple:
        """The arguments of jit.artifacts."""
        where = dispatch.forward(signature, self.target).where
        return where, signature, config, self.target.arch

    def draw(self, signature: Signature, batch: int, length: int, heads: int, device):
        """Random inputs as of Small, q, k and v (batch, length, heads, head dim)."""
        torch.manual_seed(0)
        widths = signature.head_dim, signature.head_dim, signature.head_dim_v
        dtype = DTYPES[signature.dtype]
        return [torch.randn(batch, length, heads, d, device=device).to(dtype) for d in widths]

    def inputs(self, case: Small, device="cpu") -> tuple[Tensor, ...]:
        """Of `call`."""
        return case.inputs(device)

    def lengths(self, case: Small) -> Lengths:
        """Queries and keys of every sequence."""
        return [(case.s_q, case.s_k)] * case.batch

    def error(self, case: Small, inputs, outputs: dict[str, Tensor]) -> float:
        """Of the worst row of what `call` gave, beside fp32."""
        return output_error(case, inputs, outputs["out"], self.lengths(case))

    def call(self, case: Small, inputs) -> dict[str, Tensor]:
        """What a user gets: name -> output."""
        import fa3

        options = {"causal": case.causal, "window_size": case.window, **descales_of(inputs)}
        with self.context():
            out, lse = fa3.flash_attn_func(*inputs[:3], **options, return_attn_probs=True)
        return {"out": out, "lse": lse}

    def bind(self, config: FwdConfig, causal: bool, q, k, v, *descales) -> Callable[[], Tensor]:
        """A call with another config than the table's."""
        layouts = Layout.of(q), Layout.of(k), Layout.of(v)
        of_scales = Descales(*map(Layout.of, descales))
        problem = Problem.of(*layouts, Options(causal=causal), of_scales)
        target = dispatch.target_of(q.device)
        kernel = dispatch.forward(problem.signature, target)
        run = jit.compile(kernel.where, problem.signature, config, target.kind)
        scales = problem.scales.views(q.device, *descales) if problem.scales else NO_DESCALES
        out = q.new_empty(*problem.out_shape, dtype=problem.out_dtype)
        lse = q.new_empty(*problem.lse_shape, dtype=torch.float32)
        take = counters.of(q.device) if config.is_dynamic(problem.signature) else lambda: None

        def call() -> Tensor:
            scalars = *problem.scalars, target.num_sms, *WHOLE
            run((q, k, v, out, lse, *scales, None, *NO_LENGTHS, take(), *scalars))
            return out

        return call

    @functools.cached_property
    def smalls(self) -> list[Small]:
        """What `perf.device.outputs` saves: every pair of head dims under every mask, twice."""
        cases = []
        for dims, mask in itertools.product(sorted(tuning.FORWARD), variants.MASKS):
            for turn in range(2):
                i = len(cases)
                causal, window = WINDOWS[mask]
                # alternating as in the accuracy tests, so that both compile the same kernels
                tiles = dims[0] // 32 + dims[1] // 64
                dtype = ("bf16", "fp16")[(tiles + variants.MASKS.index(mask)) % 2]
                heads = ((2, 1), (2, 2))[turn]
                s_q, s_k = LENGTHS[i % len(LENGTHS)]
                case = Small(dtype, *dims, s_q, s_k, causal, window, 1, *heads, seed=i)
                cases.append(case)
        return cases
