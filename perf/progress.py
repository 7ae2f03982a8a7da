"""A progress bar on stderr; the end of a command whose output nobody reads on."""

import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], unit: str) -> Iterator[Item]:
    """The items, with a bar that names the current one; a line for each where tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"{unit} {i} of {len(items)}: {item}", file=sys.stderr)
            yield item
        return
    with tqdm(items, unit=unit, file=sys.stderr) as bar:
        for item in bar:
            bar.set_description(str(item))
            yield item


def end_with_reader() -> None:
    """End as other tools do when the reader of stdout goes away: ... | head"""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
