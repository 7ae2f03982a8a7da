"""Log: what a step has found so far, a line per item, written as it goes.

An item that raises, kills its process or never returns costs itself only: its line says so, and the
process that takes over does the items that have no line yet.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

FRESH = 75  # exit code of a process that asks for another one: its CUDA context is lost


def context_is_lost() -> bool:
    """After an illegal access, say, nothing works in a process any more. Waits for the GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it is called: an idle context waits without one
        return True
    return False


def of_failed(items: list[dict], most: int = 6) -> list[str]:
    """A line for each of the first items with an error."""
    failed = [item for item in items if "error" in item]
    return [f"{item['item']}: {item['error'][:100]}" for item in failed[:most]]


class Log:
    """DIR/STEP.jsonl: {"begin": item}, then {"item": item, "seconds": ..., **found} or its error.

    `found` is a dict that json can write; {"skip": reason} is an item that cannot be done here.
    """

    def __init__(self, path: Path):
        self.path = path
        self._ended = {line["item"] for line in self.ended()}

    def item(self, name: str, work: Callable[[], dict]) -> None:
        """Run `work` and keep what it returns, unless an earlier process did."""
        if name in self._ended:
            return
        self.begin(name)
        start = time.monotonic()
        try:
            found = work()
        except Exception as error:  # an item's failure is a result
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        lost = context_is_lost()
        if lost:
            found = {"error": found.get("error", "it left a CUDA context that is lost")}
        self.end(name, **found, seconds=round(time.monotonic() - start, 3))
        if lost:
            raise SystemExit(FRESH)

    def begin(self, name: str) -> None:
        self._append({"begin": name})
        print(f"{name} ...", flush=True)

    def end(self, name: str, **found) -> None:
        self._ended.add(name)
        self._append({"item": name, **found})
        print(f"{name}: {str(found)[:300]}", flush=True)

    def ended(self) -> list[dict]:
        return [line for line in self._lines() if "item" in line]

    def open(self) -> str | None:
        """The item that was begun last, if it has not ended."""
        lines = self._lines()
        return lines[-1].get("begin") if lines else None

    def _lines(self) -> list[dict]:
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # its process was killed while it wrote
                continue
        return lines

    def _append(self, line: dict) -> None:
        old = self.path.read_text() if self.path.is_file() else ""
        with self.path.open("a") as file:
            file.write(("" if old.endswith("\n") or not old else "\n") + json.dumps(line) + "\n")
