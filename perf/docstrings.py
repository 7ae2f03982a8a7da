"""Docstrings of this project as markdown: what they say of arguments becomes a list."""

import itertools
import re
from collections.abc import Collection, Iterator

# A name or names, then a colon or a shape in parentheses.
_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)(?P<rest>: .*| \(.*)")
_ERRORS = "Raises:"


def listed(text: str, parameters: Collection[str]) -> str:
    """The docstring with a list item for each entry that begins with a parameter's name.

    An entry goes on in the lines after it, until one is blank or begins a sentence of its own. What
    is raised becomes a list as well, and an indented paragraph a block of code.
    """
    paragraphs = (
        list(x) for filled, x in itertools.groupby(text.splitlines(), _is_filled) if filled
    )
    return "\n\n".join("\n".join(_paragraph(lines, parameters)) for lines in paragraphs)


def _is_filled(line: str) -> bool:
    return bool(line.strip())


def _paragraph(lines: list[str], parameters: Collection[str]) -> Iterator[str]:
    if lines[0].startswith("    "):
        yield from ("```text", *(line.removeprefix("    ") for line in lines), "```")
    elif lines[0] == _ERRORS:
        yield from ("**Raises**", "")
        yield from _items([line.removeprefix("    ") for line in lines[1:]], None)
    else:
        yield from _items(lines, parameters)


def _items(lines: list[str], names: Collection[str] | None) -> Iterator[str]:
    """names: those that begin an item, None for all."""
    before, in_item = "", False
    for line in lines:
        entry = _ENTRY.fullmatch(line)
        if entry and (names is None or set(entry["names"].split(", ")) <= set(names)):
            if before and not in_item:
                yield ""
            in_item = True
            yield f"- `{entry['names']}`{entry['rest']}"
        elif in_item and not (line[0].isupper() and before.endswith(".")):
            yield f"    {line.strip()}"
        else:
            if in_item:
                yield ""
            in_item = False
            yield line
        before = line
