"""A progress bar on stderr."""

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
