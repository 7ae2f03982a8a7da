"""Attention over a sequence that is spread over processes, and what these processes do."""

import contextlib
import os
import traceback
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fa3.distributed import ring_attention, shard, unshard
from fa3.distributed.ring import Ring

PROCESSES = 4
TIMEOUT = timedelta(seconds=120)  # only a failure takes it


@dataclass(frozen=True)
class RingCase:
    """One call of ring_attention; lengths are of the whole sequence."""

    size: int = 4  # processes that share it
    order: str = "zigzag"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    with_lse: bool = False  # the loss depends on lse
    lengths: tuple[int, ...] = (96,)  # several: packed sequences
    d: int = 32
    dtype: torch.dtype = torch.bfloat16
    emulated: bool = False

    @property
    def is_packed(self) -> bool:
        return len(self.lengths) > 1

    @property
    def mask(self) -> dict:
        return {"causal": self.causal, "window": self.window}

    @property
    def cu_seqlens(self) -> torch.Tensor | None:
        if not self.is_packed:
            return None
        return F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int()

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and dout, the sink's logits and dlse, of the whole sequence."""
        generator = torch.Generator().manual_seed(7)
        rows = (1, sum(self.lengths)) if not self.is_packed else (sum(self.lengths),)
        rows = (2, rows[1]) if not self.is_packed else rows
        shapes = [(*rows, h, self.d) for h in (4, 2, 2, 4)]
        lse = (*rows[:-1], 4, rows[-1])
        tensors = [torch.randn(x, generator=generator).to(self.dtype) for x in shapes]
        return [
            *tensors,
            torch.randn(4, generator=generator),
            torch.randn(lse, generator=generator),
        ]


CASES = (
    RingCase(),
    RingCase(causal=False, with_lse=True),
    RingCase(size=2, order="contiguous", dtype=torch.float16, with_lse=True, sink=True),
    RingCase(order="contiguous", window=(9, -1), softcap=8.0),
    RingCase(window=(20, -1), sink=True),
    RingCase(causal=False, window=(30, 4)),
    RingCase(size=2, causal=False, window=(5, 50), sink=True, with_lse=True),
    RingCase(lengths=(64, 8, 0, 24), sink=True, with_lse=True),
    RingCase(order="contiguous", lengths=(48, 4, 8), softcap=5.0),
    RingCase(size=2, causal=False, lengths=(12, 44)),
    RingCase(size=2, d=64, lengths=(128,), emulated=True),
)


@dataclass
class Results:
    """What one process found."""

    found: dict = field(default_factory=dict)  # by the number of the case, or by name
    error: str | None = None


def run_process(rank: int, folder: str) -> None:
    """All cases, and torch's own context_parallel; the results go to a file."""
    results = Results()
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", meeting, TIMEOUT, PROCESSES, rank)
        pair = dist.new_group([0, 1])
        _use("reference")
        results.found["torch"] = context_parallel(rank)
        results.found["sharded"] = [sharded(*x) for x in SHARDED]
        for i, case in enumerate(CASES):
            if rank < case.size:
                _use("emulate" if case.emulated else "reference")
                results.found[i] = _attend(case, None if case.size == PROCESSES else pair)
        _use("reference")
        dist.destroy_process_group()
    except BaseException:
        results.error = traceback.format_exc()
    torch.save((results.found, results.error), f"{folder}/{rank}.pt")


def _use(kind: str) -> None:
    """What computes CPU tensors from now on."""
    from fa3 import autograd, ops
    from fa3.launch import dispatch

    os.environ["FA3_CPU"] = kind
    dispatch.target_of.cache_clear()
    for module in (ops, autograd):
        for cached in (module.plan_of, module._check_layouts):
            cached.cache_clear()
    assert dispatch.target_of(torch.device("cpu")).kind == {"emulate": "emulator"}.get(kind, kind)


def _attend(case: RingCase, group) -> dict[str, torch.Tensor]:
    """out, lse and gradients of the whole sequence, and the bytes that this process sent."""
    *qkv, dout, sink, dlse = case.inputs()
    rows = 0 if case.is_packed else 1
    spread = {"order": case.order, "group": group, "cu_seqlens": case.cu_seqlens}
    local = [shard(x, rows, **spread).requires_grad_() for x in qkv]
    given = [*local, sink.requires_grad_()] if case.sink else local
    options = {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "learnable_sink": sink if case.sink else None,
        "max_seqlen": max(case.lengths) if case.is_packed else None,
    }
    with _counting_bytes() as forward_bytes:
        out, lse = ring_attention(*local, **options, **spread, return_lse=True)
    results, slopes = [out], [shard(dout, rows, **spread)]
    if case.with_lse:
        results, slopes = [out, lse], [*slopes, shard(dlse, dlse.dim() - 1, **spread)]
    with _counting_bytes() as backward_bytes:
        gradients = torch.autograd.grad(results, given, slopes)
    found = {"out": unshard(out, rows, **spread), "lse": unshard(lse, lse.dim() - 1, **spread)}
    names = ("dq", "dk", "dv")
    found |= {n: unshard(x, rows, **spread) for n, x in zip(names, gradients, strict=False)}
    if case.sink:
        dist.all_reduce(gradients[3], group=group)
        found["dsink"] = gradients[3]
    return {**found, "sent": (sum(forward_bytes), sum(backward_bytes))}


@contextlib.contextmanager
def _counting_bytes():
    """A list of what is sent meanwhile."""
    sent = []
    shift = Ring.shift

    def counting(ring, tensors, by=1):
        sent.append(sum(x.nbytes for x in tensors) if by % ring.size else 0)
        return shift(ring, tensors, by)

    Ring.shift = counting
    try:
        yield sent
    finally:
        Ring.shift = shift


def context_parallel(rank: int) -> dict:
    """torch's ring around the flash operator, with fa3 below; F.scaled_dot_product_attention itself
    takes another operator for CPU tensors, which torch has no ring for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as torchs
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    from fa3.integrations.torch import activate, deactivate, report

    mesh = init_device_mesh("cpu", (PROCESSES,))
    whole = [x.transpose(1, 2).contiguous() for x in RingCase().inputs()[:4]]
    query, key, value, grad_out = (x.clone() for x in whole)
    chosen = F.scaled_dot_product_attention

    def flash(*qkv, is_causal):
        return torch.ops.aten._scaled_dot_product_flash_attention(*qkv, 0.0, is_causal)[0]

    flash.__name__ = chosen.__name__
    F.scaled_dot_product_attention = flash
    activate(cpu=True)
    try:
        buffers = [query, key, value, grad_out]
        with torchs(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            qkv = [x.clone().requires_grad_() for x in buffers[:3]]
            out = F.scaled_dot_product_attention(*qkv, is_causal=True)
            gradients = torch.autograd.grad(out, qkv, grad_out)
            names = ("out", "dq", "dk", "dv")
            parts = context_parallel_unshard(mesh, [out.detach(), *gradients], [2] * 4)
        found = dict(zip(names, parts, strict=True))
    finally:
        deactivate()
        F.scaled_dot_product_attention = chosen
    return {**found, "report": report()}


# A mesh, placements of q, k and v, and of out; h_q is 4, h_k 2 and the batch 2.
SHARDED = (
    ((2, 2), "0 2", "0 2"),
    ((2, 2), "2 0", "2 0"),
    ((2, 2), "- 2", "- 2"),
    ((2, 2), "1 2", "- 2"),  # not by length
    ((4,), "2", "-"),  # groups of heads would be torn
)


def sharded(mesh_shape, placements, out_placements) -> dict:
    """flash_attn_func of DTensors with a sink, forward and backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    import fa3.distributed.tensor  # noqa: F401

    def placed(text):
        return [Replicate() if x == "-" else Shard(int(x)) for x in text.split()]

    mesh = init_device_mesh("cpu", mesh_shape)
    *qkv, dout, sink, _ = RingCase().inputs()
    given = [distribute_tensor(x, mesh, placed(placements)).requires_grad_() for x in qkv]
    of_sink = [Shard(0) if x == Shard(2) else Replicate() for x in placed(placements)]
    given.append(distribute_tensor(sink, mesh, of_sink).requires_grad_())
    dout = distribute_tensor(dout, mesh, placed(out_placements))
    with CommDebugMode() as sent:
        out = fa3.flash_attn_func(*given[:3], causal=True, learnable_sink=given[3])
        gradients = torch.autograd.grad(out, given, dout)
    assert list(out.placements) == placed(out_placements)
    names = ("out", "dq", "dk", "dv", "dsink")
    found = {n: x.full_tensor() for n, x in zip(names, (out.detach(), *gradients), strict=True)}
    return {**found, "sends": sent.get_total_counts() > 0}
