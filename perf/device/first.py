"""Step: does anything work at all? One small case of every pass, and every peer, in a minute.

All at once in processes of their own, so that one that cannot start or hangs is one line.
"""

import time
from pathlib import Path

import torch

from .. import sweep
from ..backends import BACKENDS, OWN, Absent
from ..cases import BACKWARD, DTYPES, FORWARD, FORWARD_FP8, Case
from .compiling import pool
from .exact import judged
from .log import Log, of_failed

PEERS_OF = FORWARD, FORWARD_FP8, BACKWARD


def work(log: Log, folder: Path) -> None:
    from .passes import PASSES

    with pool() as processes:
        jobs = {row.name: processes.submit(call, n) for n, row in enumerate(PASSES)}
        for of_pass in PEERS_OF:
            for name in (name for name in BACKENDS[of_pass] if name not in OWN):
                jobs[f"{of_pass} peer {name}"] = processes.submit(call_peer, of_pass, name)
        for name, job in jobs.items():
            log.item(name, job.result)


def call(number: int, device: str = "cuda") -> dict:
    """The first small case of a pass: how long it took with its compilation, and how right it is.

    Raises:
        ValueError: as `judged`.
    """
    from .passes import PASSES

    row, start = PASSES[number], time.monotonic()
    case = row.smalls[0]
    off = judged(row, case, device)[2]
    return {"case": str(case), "off": off, "took_s": round(time.monotonic() - start, 1)}


def call_peer(of_pass: str, name: str) -> dict:
    """Whether it runs a case, and with which error; or why it is absent."""
    gradients = of_pass if of_pass == BACKWARD else ""
    case = Case.paper("e4m3" if of_pass == FORWARD_FP8 else "bf16", 128, False, 1024, gradients)
    torch.manual_seed(0)
    qkv = [torch.randn(case.shape, device="cuda").to(DTYPES[case.dtype]) for _ in range(3)]
    try:
        expected = sweep.exact(case, *qkv)
        return {"off": sweep.admit(case, BACKENDS[of_pass][name], qkv, expected)[1]}
    except Absent as absent:
        return {"absent": str(absent)[:300]}


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    ours = [item for item in items if " peer " not in item["item"]]
    right = [item for item in ours if "error" not in item]
    peers = [item["item"] for item in items if " peer " in item["item"] and "off" in item]
    lines = [f"{len(right)} of {len(ours)} passes are right; peers: {', '.join(peers) or 'none'}"]
    lines += of_failed(items, most=20)
    lines += [f"{item['item']}: {item['absent'][:90]}" for item in items if "absent" in item]
    return bool(ours) and len(right) == len(ours), "\n".join(lines)
