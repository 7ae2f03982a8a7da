"""Which gradients the accuracy tests ask for: a covering of all pairs of features."""

from dataclasses import dataclass

import torch

import fa3
from fa3.kernels.signature import head_dim_tile
from fa3.launch import dispatch, tuning

from . import reference
from .accuracy import assert_accurate
from .cases import MASKS, Bordered, Case, dtype_of, kind_of, make_inputs, pairwise


@dataclass(frozen=True)
class BackwardCase(Case):
    """One call of flash_attn_func and the gradients of its inputs."""

    with_lse: bool = False  # the loss depends on lse, too


FACTORS = {
    "dims": (
        *((64, 64), (40, 8), (96, 96), (128, 128), (104, 120), (72, 88), (64, 128)),
        *((192, 128), (192, 192), (256, 256), (248, 200)),
    ),
    "mask": range(len(MASKS)),  # of those of the tile
    "lengths": ((1, 40), (64, 64), (70, 200), (100, 129), (150, 70)),
    "heads": ((2, 2), (2, 1), (3, 1)),
    "layout": ("bshd", "bhsd", "packed", "expanded"),
    "scale": (None, 0.3),
    "num_ctas": (None, 2),
    "with_lse": (False, True),
}
# With a function of scores or a sink: each combination with its own mask, heads and tiles.
SCORE_CASES = (
    BackwardCase(s_q=100, s_k=150, h_k=1, causal=True, softcap=5.0, softmax_scale=0.5),
    BackwardCase(
        *("fp16", 104, 120), batch=2, s_q=70, s_k=150, window=(30, 20), softcap=20.0, sink="batch"
    ),
    BackwardCase(head_dim=192, head_dim_v=128, s_q=70, s_k=90, h_q=3, h_k=1, softcap=30.0),
    BackwardCase(
        batch=2, s_q=150, s_k=100, h_q=4, causal=True, layout="packed", sink="bf16", with_lse=True
    ),
    BackwardCase("fp16", 128, 128, batch=2, s_q=64, s_k=130, sink="strided"),
)
# Kernels of a backward pass take long to compile: a pair of tiles meets some kinds of masks.
KINDS = {
    (64, 64): ("full", "causal", "local"),
    (96, 96): ("causal", "local"),
    (128, 128): ("full", "causal", "local"),
    (192, 128): ("full", "local"),
    (192, 192): ("causal",),
    (256, 256): ("full", "causal"),
}


def covering(seed: int = 1) -> list[BackwardCase]:
    """In the order of their kernels."""
    cases = []
    for row in pairwise(FACTORS, seed):
        head_dim, head_dim_v = row["dims"]
        tiles = tuning.backward_tiles(head_dim_tile(head_dim), head_dim_tile(head_dim_v))
        masks = [mask for mask in MASKS if kind_of(mask) in KINDS[tiles]]
        causal, window = mask = masks[row["mask"] % len(masks)]
        cases.append(
            BackwardCase(
                dtype=dtype_of(tiles, mask),
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                batch=2 if row["layout"] == "expanded" else 1,
                h_q=row["heads"][0],
                h_k=row["heads"][1],
                s_q=row["lengths"][0],
                s_k=row["lengths"][1],
                causal=causal,
                window=window,
                layout=row["layout"],
                softmax_scale=row["scale"],
                num_ctas=row["num_ctas"],
                with_lse=row["with_lse"],
            )
        )
    return sorted(cases, key=lambda c: (c.head_dim, c.causal, c.window, repr(c)))


def attention(case: Case, q, k, v, device, sink=None):
    """(out, lse) of a case."""
    sms = dispatch.target_of(device).num_sms
    return fa3.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        window_size=case.window,
        sm_margin=0 if case.num_ctas is None else max(0, sms - case.num_ctas),
        return_attn_probs=True,
        softcap=case.softcap,
        learnable_sink=sink,
    )


def gradients(results, inputs, dout, dlse=None):
    """dq, dk, dv, and of the sink where there is one, of (out, lse)."""
    given = ((results[0], dout),) if dlse is None else zip(results, (dout, dlse), strict=True)
    outputs, tangents = zip(*given, strict=True)
    return torch.autograd.grad(outputs, inputs, tangents)


def check(case: BackwardCase, device) -> None:
    """All gradients against fp32, with NaN around the inputs."""
    bordered = make_inputs(case, device)
    inputs = [x.tensor.requires_grad_() for x in bordered]
    sinks = [] if case.sink is None else [case.learnable_sink(device).requires_grad_()]
    inputs += sinks
    results = attention(case, *inputs[:3], device, *sinks)
    layout = "bshd" if case.layout == "expanded" else case.layout
    dout = Bordered(torch.randn_like(results[0]), layout)
    dlse = torch.randn_like(results[1]) if case.with_lse else None
    given = gradients(results, inputs, dout.tensor, dlse)
    values = [x.values.clone().requires_grad_() for x in bordered]
    values += [x.detach().clone().requires_grad_() for x in sinks]
    score = {"softcap": case.softcap, "sink": values[3] if sinks else None}
    expected = []
    for attend in (reference.exact, reference.baseline_with_lse):
        attended = attend(*values[:3], case.softmax_scale, **case.mask, **score)
        expected.append(gradients(attended, values, dout.values, dlse))
    for name, *x in zip(("dq", "dk", "dv", "dsink"), given, *expected, strict=False):
        assert_accurate(name, *x)
