"""`python -m perf.figures` (make figures): the timelines of docs/algorithm.md, from the emulator.

Nominal times (fa3/emulator/profiling/clock.py): which order things have and what waits for what,
not how long they take on a GPU.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from fa3 import emulator
from fa3.inspect import cli, run
from fa3.inspect.call import Call, Lengths

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"


@dataclass(frozen=True)
class Timeline:
    """A stretch of the first tile of a kernel, in the words of `fa3 inspect`."""

    name: str
    arguments: tuple[str, ...]
    start: int
    end: int  # nominal cycles
    lengths: Lengths = Lengths(s_q=192, s_k=2048)

    def write(self, folder: Path) -> Path:
        args = cli.arguments(["inspect", *self.arguments])
        inspection = cli.inspect(cli.signature_of(args))
        launch = run.run(inspection, Call.of(args), self.lengths)
        path = folder / f"{self.name}.png"
        run.write_timeline(inspection, launch, path, start=self.start, end=self.end)
        return path


TIMELINES = (
    Timeline("forward_d128", ("--head-dim", "128"), 4800, 14_700),
    Timeline("forward_d64", ("--head-dim", "64"), 4800, 9800),
    Timeline("forward_fp8_d128", ("--head-dim", "128", "--dtype", "e4m3"), 8300, 14_300),
    Timeline(
        "backward_d128", ("--backward", "--head-dim", "128"), 6000, 14_000, Lengths(1024, 128)
    ),
    Timeline(
        "backward_d192",
        ("--backward", "--head-dim", "192", "--head-dim-v", "128"),
        *(6000, 14_000),
        Lengths(1024, 96),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (docs/figures)")
    args = parser.parse_args()
    os.environ["FA3_CPU"] = "emulate"  # a backward pass is run by a call
    emulator.install()
    args.out.mkdir(parents=True, exist_ok=True)
    for timeline in TIMELINES:
        print(timeline.write(args.out))


if __name__ == "__main__":
    main()
