"""packaging/flash-attn-3 and the programs that look for FlashAttention-3: found, and called.

Each runs in a process of its own, with the distribution laid out as pip would. The test of a
program that cannot be imported is skipped, and says why.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "packaging" / "flash-attn-3"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, str]:
    """A folder as of site-packages with the distribution in it, and its version."""
    folder = tmp_path_factory.mktemp("site")
    project = (PROJECT / "pyproject.toml").read_text()
    name, version = (re.search(rf'^{x} = "(.+?)"', project, re.M)[1] for x in ("name", "version"))
    info = folder / f"flash_attn_3-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("flash_attn_3\nflash_attn_interface\n")
    for source in (PROJECT / "src").iterdir():
        (folder / source.name).symlink_to(source)
    return folder, version


HEAD = """
import importlib.metadata, json, os, sys
sys.path.insert(0, {path!r})
import torch
import fa3
torch.manual_seed(0)
try:
    if {program!r} == "xfuser":  # it wants a torch built for GPUs
        torch.version.cuda = "13.0"
    import {program}
except ImportError as error:
    print(json.dumps(str(error)))
    raise SystemExit
def same(found, wanted):
    return [torch.equal(x, y) for x, y in zip(found, wanted, strict=True)]
def of_keys(q, k, v, *counts):  # by sequence
    alone = [(q[i:i + 1], k[i:i + 1, :n], v[i:i + 1, :n]) for i, n in enumerate(counts)]
    return torch.cat([fa3.flash_attn_func(*x) for x in alone])
"""


def answer_of(program: str, script: str, folder: Path):
    """What the script prints last."""
    if importlib.util.find_spec(program) is None:
        pytest.skip(f"{program} is not installed")
    head = HEAD.format(path=str(folder), program=program)
    environment = {**os.environ, "FA3_CPU": "reference"}  # who calls whom needs no kernel
    done = subprocess.run(
        [sys.executable, "-c", head + script],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    if isinstance(answer, str):
        pytest.skip(f"{program}: {answer}")
    return answer


TRANSFORMERS = """
from transformers import modeling_flash_attention_utils as flash
from transformers.utils import is_flash_attn_3_available
from transformers.utils import import_utils
import_utils.is_torch_cuda_available = lambda: True
import flash_attn_interface
found = flash._lazy_imports("flash_attention_3")
check = flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[3]["pkg_availability_check"]
print(json.dumps([
    importlib.metadata.version("flash-attn-3"), check(), is_flash_attn_3_available(),
    [f is getattr(fa3, f.__name__, None) for f in found[:3]],
]))
"""


def test_transformers(installed):
    """It thinks that it has a GPU."""
    folder, version = installed
    assert answer_of("transformers", TRANSFORMERS, folder) == [version, True, True, [True] * 3]
    assert version.startswith("3.0.0+")


DIFFUSERS = """
from diffusers.models import attention_dispatch as dispatch
# their operator for the dense function has a kernel for CUDA alone
operator = dispatch._wrapped_flash_attn_3
operator.register_kernel("cpu")(operator._init_fn)
call = dispatch.dispatch_attention_fn
q, k, v = (torch.randn(2, 40, 4, 64).bfloat16() for _ in range(3))
with dispatch.attention_backend("_flash_3"):
    dense = call(q, k, v, is_causal=True)
mask = torch.arange(40) < torch.tensor([[40], [23]])
with dispatch.attention_backend("_flash_varlen_3"):
    masked = call(q, k, v, attn_mask=mask)
print(json.dumps([
    dispatch.flash_attn_3_func is fa3.flash_attn_func,
    dispatch.flash_attn_3_varlen_func is fa3.flash_attn_varlen_func,
    *same([dense], [fa3.flash_attn_func(q, k, v, causal=True)]),
    *same([masked], [of_keys(q, k, v, 40, 23)]),
]))
"""


def test_diffusers(installed):
    assert answer_of("diffusers", DIFFUSERS, installed[0]) == [True] * 4


XFUSER = """
from xfuser.core.distributed import attention_backend as backend
q, k, v = (torch.randn(2, 4, 40, 64).bfloat16() for _ in range(3))
rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
calls, kinds = backend.ATTENTION_FUNCTION_REGISTRY, backend.AttentionBackendType
found = [backend.env_info["has_flash_attn_3"], backend.flash_attn_func_3 is fa3.flash_attn_func]

out, lse = calls[kinds.FLASH_3](q, k, v, 0.0, True)
wanted = fa3.flash_attn_func(*rows, causal=True, return_attn_probs=True)
found += same([out.transpose(1, 2), lse], wanted)

lengths = {
    "indices_k": torch.cat([torch.arange(40), torch.arange(40, 63)]),
    "cu_seqlens_k": torch.tensor([0, 40, 63], dtype=torch.int32),
    "max_seqlen_k": 40,
}
out, _ = calls[kinds.FLASH_3](q, k, v, 0.0, False, lengths)
found += same([out.transpose(1, 2)], [of_keys(*rows, 40, 23)])

out, _ = calls[kinds.FLASH_3_FP8](q, k, v, 0.0, True)
given = [backend.per_tensor_quant(x) for x in rows]
names = "q_descale", "k_descale", "v_descale"
scales = {name: scale.max().repeat(2, 4) for name, (_, scale) in zip(names, given)}
wanted = fa3.flash_attn_func(*(x for x, _ in given), causal=True, **scales)
found += same([out.transpose(1, 2)], [wanted])
print(json.dumps(found))
"""


def test_xfuser(installed):
    """16 bits, keys that are masked out, FP8 with scales that repeat by stride 0."""
    assert answer_of("xfuser", XFUSER, installed[0]) == [True] * 6


YUNCHANG = """
import torch.distributed as dist
from yunchang.globals import HAS_FLASH_ATTN_HOPPER
from yunchang.kernels import AttnType, select_flash_attn_impl
from yunchang.ring.ring_flash_attn import ring_flash_attn_func
q, k, v, dout = (torch.randn(2, 40, 4, 64).bfloat16() for _ in range(4))
leaves = [x.clone().requires_grad_() for x in (q, k, v)]
out, lse = fa3.flash_attn_func(*leaves, return_attn_probs=True)
gradients = torch.autograd.grad(out, leaves, dout)
found = [HAS_FLASH_ATTN_HOPPER]

forward = select_flash_attn_impl(AttnType.FA3, "fwd-only")
found += same(forward(q, k, v, 0.0, 0.125, False, (-1, -1), 0.0, None, False), (out, lse))
backward = select_flash_attn_impl(AttnType.FA3, "bwd-only")
filled = [torch.zeros_like(x) for x in (q, k, v)]
backward(dout, q, k, v, out, lse, *filled, 0.0, 0.125, False, (-1, -1), 0.0, None, False, None)
found += same(filled, gradients)
causal = select_flash_attn_impl(AttnType.FA3, "fwd-bwd")(q, k, v, softmax_scale=0.125, causal=True)
found += same([causal], [fa3.flash_attn_func(q, k, v, causal=True)])

rank = int(os.fork() == 0)
store = dist.FileStore(os.path.join(sys.path[0], "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mine = lambda x: x.detach().chunk(2, 1)[rank]
leaves = [mine(x).clone().requires_grad_() for x in (q, k, v)]
ring = ring_flash_attn_func(*leaves, causal=False, attn_type=AttnType.FA3)
results = ring, *torch.autograd.grad(ring, leaves, mine(dout))
errors = [(x - mine(y)).abs().max() / y.abs().max() for x, y in zip(results, (out, *gradients))]
errors = torch.stack(errors).float()
dist.all_reduce(errors, dist.ReduceOp.MAX)
dist.destroy_process_group()
if rank:
    os._exit(0)
print(json.dumps([*found, *errors.tolist()]))
"""


def test_yunchang(installed):
    """Both of its private calls, the public one, and its ring of two processes with gradients.

    Its private calls pass causal=False whatever they are given: causal is for the public one.
    """
    *found, out, dq, dk, dv = answer_of("yunchang", YUNCHANG, installed[0])
    assert found == [True] * 7
    assert max(out, dq, dk, dv) < 2**-6  # two partial results in bf16, of 2**-8 each
