"""The process of one step: `python -m perf.device.worker MODULE:FUNCTION DIR STEP`."""

import importlib
import sys
from pathlib import Path

from .log import Log


def main(work: str, folder: str, step: str) -> None:
    module, _, function = work.partition(":")
    getattr(importlib.import_module(module), function)(
        Log(Path(folder) / f"{step}.jsonl"), Path(folder)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
