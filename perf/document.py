"""The generated part of a document: it begins and ends with a line that marks it."""


def table(head, rows) -> str:
    """A markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


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
