"""What a kernel's cache entry depends on: all that its code is made of, and no more."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fa3.launch import dispatch, fingerprint

ROOT = Path(__file__).parent.parent
FIRST = """
'''A kernel.'''
from . import shared
from .helpers import scale

def make(signature, config):
    "Makes it."
    from .late import Late
    return Late(scale)  # a comment
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """write(name, text) changes a module of a package; returns both fingerprints of its kernel."""
    folder = tmp_path / "package_of_kernels"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("package_of_kernels", None)  # that of the test before

    def write(name: str, text: str) -> tuple[str, str]:
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        fingerprint._tree.cache_clear()
        fingerprint.of_file.cache_clear()
        first = "package_of_kernels.first"
        return tuple(fingerprint.of_modules(first, with_lines) for with_lines in (False, True))

    for name in ("__init__", "shared", "unrelated"):
        (folder / f"{name}.py").write_text("")
    (folder / "helpers.py").write_text("from .deep import scale")
    (folder / "deep.py").write_text("scale = 1")
    (folder / "late.py").write_text("class Late: ...")
    return write


@pytest.mark.parametrize(
    ("old", "new"),
    [("a comment", "another"), ("A kernel.", "The kernel."), ("Makes it.", "It is made.")],
)
def test_words_do_not_count(package, old, new):
    assert package("first", FIRST) == package("first", FIRST.replace(old, new))


def test_lines_count_where_they_are_named(package):
    plain, with_lines = package("first", FIRST)
    moved = package("first", f"\n{FIRST}")
    assert moved[0] == plain
    assert moved[1] != with_lines


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("first", FIRST.replace("Late(scale)", "Late(2 * scale)")),
        ("shared", "a = 1"),
        ("helpers", "from .deep import scale as scale"),
        ("deep", "scale = 2"),
        ("late", "class Late: a = 1"),
    ],
)
def test_code_counts_wherever_it_is_imported_from(package, name, text):
    before = package("first", FIRST)
    assert all(x != y for x, y in zip(package(name, text), before, strict=True))


def test_code_that_is_not_imported_does_not_count(package):
    before = package("first", FIRST)
    assert package("unrelated", "a = 1") == before
    assert package("new", "a = 1") == before


def test_16_bit_and_fp8_kernels_share_what_they_share():
    sixteen, fp8 = (
        {name.rpartition(".")[2] for name in fingerprint.modules_of(kernel.where.partition(":")[0])}
        for kernel in dispatch.FORWARD[:2]
    )
    assert {"kernel", "attend", "load", "softmax", "mask", "blocks", "scheduler"} <= sixteen & fp8
    assert sixteen - fp8 == {"operands_16bit"}
    assert fp8 - sixteen == {"operands_fp8", "store_fp8", "transpose", "scales"}


def test_no_kernel_is_imported():
    """That would load the DSL, which takes seconds and may not be needed."""
    code = (
        "import sys; from fa3.launch import dispatch, fingerprint\n"
        "for kernel in dispatch.FORWARD: fingerprint.modules_of(kernel.where.partition(':')[0])\n"
        "print(sorted(name for name in sys.modules if name.startswith(('cutlass', 'fa3.kernels'))))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ast.literal_eval(done.stdout))
    assert {"fa3.kernels", "fa3.kernels.sm90.forward"} <= loaded
    assert not any(name.startswith("cutlass") for name in loaded)


def test_modules_are_those_of_this_package():
    """fa3/kernels may be a link: what it points at is read."""
    found = fingerprint.modules_of("fa3.kernels.softmax")
    assert {"fa3.kernels.softmax", "fa3.kernels.exp2", "fa3.kernels.views"} <= set(found)
    assert all(path.is_file() and not path.is_symlink() for path in found.values())
    assert all(name.startswith("fa3.kernels") for name in found)
