"""A hash of what a kernel's code is generated from: the modules it imports, as syntax trees.

Comments, docstrings and layout do not count. Modules are followed from the kernel's own through
their import statements, those inside of functions too, as long as they are kernel code.
"""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

KERNELS = "fa3.kernels"


def of_modules(first: str, with_lines: bool) -> str:
    """Of the module `first` and all that it depends on.

    with_lines: where its statements stand counts, too, as it does for a table of lines.
    """
    found = modules_of(first)
    content = "".join(f"{name} {of_file(found[name], with_lines)}\n" for name in sorted(found))
    return hashlib.sha256(content.encode()).hexdigest()


def modules_of(first: str) -> dict[str, Path]:
    """`first` and what it imports of its own package and of fa3.kernels, with what those import.

    None of them is executed but the packages that hold them.
    """
    roots = KERNELS, first.rpartition(".")[0] or first
    found, waiting = {}, [first]
    while waiting:
        name = waiting.pop()
        if name in found or not any(name == root or name.startswith(f"{root}.") for root in roots):
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a bare folder has no origin
            continue
        found[name] = Path(spec.origin).resolve()
        package = spec.name if _is_package(spec) else spec.parent
        for base, names in _imported(_tree(found[name]), package):
            waiting.append(base)
            if names and base.startswith(roots) and _is_package(importlib.util.find_spec(base)):
                waiting += (f"{base}.{name}" for name in names)
    return found


def _is_package(spec: ModuleSpec | None) -> bool:
    return spec is not None and spec.submodule_search_locations is not None


@functools.cache
def of_file(path: Path, with_lines: bool) -> str:
    tree = _tree(path)
    content = ast.dump(tree)
    if with_lines:
        content += str([getattr(node, "lineno", 0) for node in ast.walk(tree)])
    return hashlib.sha256(content.encode()).hexdigest()


@functools.cache
def _tree(path: Path) -> ast.Module:
    """Without docstrings."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef():
                if ast.get_docstring(node, clean=False) is not None:
                    del node.body[0]
    return tree


def _imported(tree: ast.Module, package: str) -> Iterator[tuple[str, list[str]]]:
    """Each module that the code imports, and the names that it imports from there."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from ((alias.name, []) for alias in names)
            case ast.ImportFrom(module, names, level):
                base = importlib.util.resolve_name("." * level + (module or ""), package)
                yield base, [alias.name for alias in names]
