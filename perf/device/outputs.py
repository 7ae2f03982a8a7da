"""Step: outputs of small cases, for every machine to compare its emulator with.

DIR/golden/PASS.npz holds, for case i: `i.case` (JSON of the case, the digest of its inputs, where
it was made), and for each output `i.NAME`. Of an output (b, s, h, d) only ROWS rows along s are
kept; 16-bit ones as int16. Committed under tests/golden/, a test reads them.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..sweep import this_machine
from .exact import judged
from .log import Log, of_failed
from .passes import PASSES
from .small import Small, digest

ROWS = 14  # of every head: some hundred kilobytes in all


@dataclass(frozen=True)
class Stored:
    """One case of a file."""

    case: Small
    inputs_digest: str
    made: dict[str, str]  # the fields of perf.results.Machine
    outputs: dict[str, Tensor]


def rows_kept(length: int) -> Tensor:
    return torch.linspace(0, length - 1, min(ROWS, length)).round().long()


def keep(row, case: Small, made: dict, device) -> Stored:
    """Run a case and keep what is compared.

    Raises:
        ValueError: as `judged`, so that no nonsense is committed.
    """
    inputs, found, _ = judged(row, case, device)
    rows = {name: rows_kept(x.shape[1]) for name, x in found.items() if x.dim() == 4}
    outputs = {}
    for name, x in found.items():
        outputs[name] = (x[:, rows[name].to(x.device)] if name in rows else x).cpu()
    return Stored(case, digest(inputs), made, outputs)


def save(path: Path, stored: list[Stored]) -> None:
    arrays = {}
    for i, one in enumerate(stored):
        about = {"case": asdict(one.case), "inputs": one.inputs_digest, "made": one.made}
        about["outputs"] = {n: str(x.dtype).removeprefix("torch.") for n, x in one.outputs.items()}
        arrays[f"{i}.case"] = np.array(json.dumps(about))
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
            yield Stored(Small(**about["case"]), about["inputs"], about["made"], outputs)


def work(log: Log, folder: Path) -> None:
    made = asdict(this_machine())
    target = folder / "golden"
    target.mkdir(exist_ok=True)
    for row in PASSES:

        def run(row=row) -> dict:
            stored, wrong = [], []
            for case in row.smalls:
                try:
                    stored.append(keep(row, case, made, "cuda"))
                except ValueError as error:
                    wrong.append(f"{case}: {error}")
            path = target / f"{row.name}.npz"
            save(path, stored)
            return {"cases": len(stored), "bytes": path.stat().st_size, "wrong": wrong}

        log.item(row.name, run)


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    bad = of_failed(items)
    lines, good = [], bool(items) and not bad
    for item in (item for item in items if "error" not in item):
        good = good and not item["wrong"]
        lines.append(f"{item['item']}: {item['cases']} cases, {item['bytes'] / 1024:.0f} KiB")
        lines += [f"wrong: {name}" for name in item["wrong"][:4]]
    return good, "\n".join([*lines, *bad])
