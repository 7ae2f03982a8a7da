"""Step: compute-sanitizer on the small cases of every pass.

`python -m perf.device.sanitize NUMBER` makes the calls of one pass and nothing else.
"""

import re
import subprocess
import sys
from pathlib import Path

from .environment import tool
from .log import Log

TOOLS = ("memcheck", "racecheck")
TOTAL = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed)(.*)")


def work(log: Log, folder: Path) -> None:
    from .passes import PASSES

    sanitizer = tool("compute-sanitizer")
    for number, row in enumerate(PASSES):
        for name in TOOLS:
            output = folder / f"sanitizer-{row.name}-{name}.txt"
            command = [sanitizer, "--tool", name, "--print-limit", "20"]
            command += [sys.executable, "-m", __name__, str(number)]
            if sanitizer is None:
                skip = {"skip": "compute-sanitizer is not installed"}
                log.item(f"{row.name} {name}", lambda skip=skip: skip)
            else:
                log.item(f"{row.name} {name}", lambda c=command, o=output: check(c, o))


def check(command: list[str], output: Path) -> dict:
    """What the tool counted; raises where it counted nothing."""
    with output.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    text = output.read_text(errors="replace")
    total = TOTAL.search(text)
    if total is None or "all calls made" not in text:
        lines = text.split("\n")
        raise RuntimeError(f"exit code {code}, no result: {' '.join(lines[-6:])[-300:]}")
    first = next((line for line in text.splitlines() if "=========     at" in line), "")
    return {"errors": int(total[1]), "detail": total[2].strip(" ()"), "first": first.strip("= ")}


def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
    lines = []
    for item in items:
        found = item.get("error") or f"{item['errors']} errors {item['detail']} {item['first']}"
        lines.append(f"{item['item']}: {found.strip()[:110]}")
    return bool(items) and all(i.get("errors") == 0 for i in items), "\n".join(lines)


def calls(number: int) -> None:
    import torch

    from .passes import PASSES

    row = PASSES[number]
    for case in row.sanitized:
        row.call(case, case.inputs("cuda"))
        torch.cuda.synchronize()
    print("all calls made")


if __name__ == "__main__":
    calls(int(sys.argv[1]))
