"""The generated part of a document: it begins and ends with a line that marks it."""

from collections.abc import Iterator
from itertools import chain


def table(head, rows) -> str:
    """A markdown table."""
    return "\n".join(lines_of_table(head, rows))


def lines_of_table(head, rows) -> Iterator[str]:
    """Its lines, each as soon as its row is there."""
    for cells in chain((head, ["---"] * len(head)), rows):
        yield f"| {' | '.join(cells)} |"


def insert(document: str, text: str) -> str:
    """The document with `text`, marks and all, in place of what stands between the same marks.

    ValueError where a mark is missing.
    """
    first, *_, last = text.splitlines()
    before, begin, rest = document.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"no table between {first!r} and {last!r}")
    return before + text + after
