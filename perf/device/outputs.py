"""Step: outputs of small cases, for every machine to compare its emulator with.

DIR/golden/PASS.npz holds, for case i: `i.case` (JSON of the case, the digest of its inputs, where
it was made), and for each output `i.NAME`. Of an output (b, s, h, d) only ROWS rows along s are
kept, `i.rows`; 16-bit ones as int16. Committed under tests/golden/, a test reads them.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..sweep import this_machine
from .log import Log, of_failed
from .passes import PASSES
from .small import Small, decoded, digest

ROWS = 14  # of every head: some hundred kilobytes in all


@dataclass(frozen=True)
class Stored:
    """One case of a file."""

    case: Small
    inputs_digest: str
    made: dict[str, str]  # the fields of perf.results.Machine
    rows: Tensor  # which rows of s the outputs (b, s, h, d) keep
    outputs: dict[str, Tensor]


def rows_kept(length: int) -> Tensor:
    return torch.linspace(0, length - 1, min(ROWS, length)).round().long()


def keep(row, case: Small, made: dict, device) -> Stored:
    """Run a case and keep what is compared."""
    inputs = case.inputs(device)
    rows = rows_kept(case.s_q)
    outputs = {}
    for name, x in row.call(case, inputs).items():
        outputs[name] = (x[:, rows.to(x.device)] if x.dim() == 4 else x).cpu()
    return Stored(case, digest(inputs), made, rows, outputs)


def save(path: Path, stored: list[Stored]) -> None:
    arrays = {}
    for i, one in enumerate(stored):
        about = {"case": asdict(one.case), "inputs": one.inputs_digest, "made": one.made}
        about["outputs"] = {n: str(x.dtype).removeprefix("torch.") for n, x in one.outputs.items()}
        arrays[f"{i}.case"] = np.array(json.dumps(about))
        arrays[f"{i}.rows"] = one.rows.numpy().astype(np.int32)
        for name, x in one.outputs.items():
            bits = x.contiguous().view(torch.int16) if x.element_size() == 2 else x
            arrays[f"{i}.{name}"] = bits.numpy()
    np.savez_compressed(path, **arrays)


def load(path: Path) -> Iterator[Stored]:
    with np.load(path, allow_pickle=False) as arrays:
        count = sum(name.endswith(".case") for name in arrays.files)
        for i in range(count):
            about = json.loads(str(arrays[f"{i}.case"]))
            about["case"]["window"] = tuple(about["case"]["window"])
            outputs = {}
            for name, dtype in about["outputs"].items():
                x = torch.from_numpy(arrays[f"{i}.{name}"])
                outputs[name] = x.view(getattr(torch, dtype))
            rows = torch.from_numpy(arrays[f"{i}.rows"]).long()
            case = Small(**about["case"])
            yield Stored(case, about["inputs"], about["made"], rows, outputs)


def work(log: Log, folder: Path) -> None:
    made = asdict(this_machine())
    target = folder / "golden"
    target.mkdir(exist_ok=True)
    for row in (row for row in PASSES if row.smalls):

        def run(row=row) -> dict:
            stored = [keep(row, case, made, "cuda") for case in row.smalls]
            path = target / f"{row.name}.npz"
            save(path, stored)
            wrong = [str(one.case) for one in stored if not _near_fp32(one)]
            return {"cases": len(stored), "bytes": path.stat().st_size, "wrong": wrong}

        log.item(row.name, run)


def _near_fp32(stored: Stored) -> bool:
    """Coarse: the accuracy suite judges; this keeps nonsense from being committed."""
    from .. import check

    case = stored.case
    q, k, v = decoded(*case.inputs())
    k, v = (x.repeat_interleave(case.h_q // case.h_k, dim=2) for x in (k, v))
    left, right = case.window
    seen = check.visible_keys(case.s_q, case.s_k, left, 0 if case.causal else right)
    heads_first = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    exact = check.attention(*heads_first, seen).unflatten(0, (case.batch, -1)).transpose(1, 2)
    sighted = torch.ones(case.s_q, dtype=torch.bool) if seen is None else seen.any(-1)
    ours = stored.outputs["out"][:, sighted[stored.rows]]
    error = check.row_error(ours, exact[:, stored.rows[sighted[stored.rows]]])
    return error <= check.ROW_ERROR[case.dtype]


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    bad = of_failed(items)
    lines, good = [], bool(items) and not bad
    for item in (item for item in items if "error" not in item):
        good = good and not item["wrong"]
        lines.append(f"{item['item']}: {item['cases']} cases, {item['bytes'] / 1024:.0f} KiB")
        lines += [f"wrong: {name}" for name in item["wrong"][:4]]
    return good, "\n".join([*lines, *bad])
