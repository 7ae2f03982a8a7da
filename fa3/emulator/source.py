"""The Python source of a kernel, as far as it can be read."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


@functools.lru_cache(maxsize=256)
def _read(path: str) -> tuple[str, ...]:
    try:
        return tuple(Path(path).read_text(encoding="utf-8").split("\n"))
    except (OSError, UnicodeDecodeError):
        return ()


@functools.lru_cache(maxsize=256)
def _functions(path: str) -> tuple[tuple[int, int, str], ...]:
    """(first line, last line, name) of every function, outer ones first."""
    try:
        tree = ast.parse("\n".join(_read(path)))
    except (SyntaxError, ValueError):
        return ()
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    found = ((n.lineno, n.end_lineno, n.name) for n in ast.walk(tree) if isinstance(n, kinds))
    return tuple(sorted(found, key=lambda f: (f[0], -f[1])))


def function_at(path: str, line: int) -> str:
    """The innermost function that a line (from 1) belongs to; "" if there is none to be found."""
    return next((n for a, b, n in reversed(_functions(path)) if a <= line <= b), "")


@functools.lru_cache(maxsize=256)
def _assignments(path: str) -> tuple[tuple[int, int, tuple[str, ...]], ...]:
    """(first line, last line, names) of every assignment, in order."""
    try:
        tree = ast.parse("\n".join(_read(path)))
    except (SyntaxError, ValueError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            several = isinstance(target, ast.Tuple | ast.List)
            names = tuple(map(ast.unparse, target.elts if several else [target]))
            found.append((node.lineno, node.end_lineno, names))
    return tuple(sorted(found))


def assigned_at(path: str, line: int) -> tuple[int, tuple[str, ...]] | None:
    """(first line, names) of the assignment that a line (from 1) belongs to."""
    found = ((a, names) for a, b, names in reversed(_assignments(path)) if a <= line <= b)
    return next(found, None)


def line_at(path: str, line: int) -> str:
    """The text of a line (from 1), "" if it cannot be read."""
    lines = _read(path)
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""
