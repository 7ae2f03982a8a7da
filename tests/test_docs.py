"""The documents: links lead somewhere, and what they name exists."""

import ast
import itertools
import re
import runpy
from pathlib import Path

import pytest

from perf import support

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TOP = r"(?:fa3|kernels|tests|perf|docs)/[\w./-]*\w"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    missing = [
        target for target in targets if "://" not in target and not (path.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path):
    """Every `folder/file.py` of the running text; the table of what is to come is left out."""
    text = path.read_text().partition("where the next ones go")[0]
    named = set(re.findall(rf"`({TOP}\.(?:py|md|c))`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_page_is_in_the_sites_navigation():
    """`make docs` builds it, which is too heavy for a test. perf/site.py adds pages from above."""
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = re.findall(r": (\S+\.md)$", text, re.M)
    above = re.findall(r'"(\w+\.md)"', (ROOT / "perf" / "site.py").read_text())
    assert sorted(pages) == sorted([x.name for x in DOCS.glob("*.md")] + above)
    assert all((ROOT / name).exists() for name in above)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_stay_within_the_site(path):
    """A page above docs/ has no place there."""
    assert re.findall(r"\]\(\.\./[^)]*\)", path.read_text()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_headings_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", path.read_text()):
        other = path.parent / target if target else path
        assert anchor in set(anchors(other)), f"{other.name}#{anchor}"


def anchors(path):
    for heading in re.findall(r"^#+ (.*)$", path.read_text(), re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_environment_variables_are_those_that_the_code_reads():
    read = set()
    for path in itertools.chain(*((ROOT / x).rglob("*.py") for x in ("fa3", "perf"))):
        for node in ast.walk(ast.parse(path.read_text())):
            read |= set(_variables(node))
    listed = re.findall(r"`([A-Z0-9_]{2,})`", "".join(_first_cells(DOCS / "environment.md")))
    set_alone = {"PYTHONUNBUFFERED", "OMP_NUM_THREADS"}  # of processes that perf starts
    assert sorted(listed) == sorted(read - set_alone)
    assert len(listed) >= 9


def _variables(node):
    """The names of environment variables in an expression, as in os.environ.get("X")."""
    match node:
        case ast.Call(
            func=ast.Attribute(
                attr="get" | "setdefault" | "pop", value=ast.Attribute(attr="environ")
            ),
            args=[ast.Constant(value=name), *_],
        ):
            yield name
        case ast.Subscript(
            value=ast.Attribute(attr="environ"),
            slice=ast.Constant(value=name),
            ctx=ast.Load(),
        ):
            yield name


def _first_cells(path):
    return re.findall(r"^\| ([^|]*) \|", path.read_text(), re.M)


def test_the_page_on_attention_is_its_example(plain_torch, capsys):
    example = DOCS / "examples" / "attention.py"
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "attention.md").read_text(), re.S)
    assert len(blocks) == 8
    for block in blocks:
        assert block in example.read_text()
    runpy.run_path(str(example), run_name="__main__")
    assert len(re.findall("fa3 agrees$", capsys.readouterr().out, re.M)) == 5


def cells_of_support():
    """(architecture, row, column, text) of each cell of docs/support.md."""
    text = support.DOCUMENT.read_text()
    for arch in support.TARGETS:
        capability = ".".join(map(str, support.TARGETS[arch].capability))
        (part,) = (x for x in text.split("\n## ")[1:] if capability in x.partition("\n")[0])
        for line in re.findall(r"^\| (\w.*) \|$", part, re.M):
            row, *cells = line.split(" | ")
            for column, cell in zip(support.COLUMNS, cells, strict=True):
                yield arch, row, column, cell


def test_the_support_matrix_is_up_to_date(device):
    """Every cell with one pair of head dims, which take turns; `python -m perf.support` has all."""
    found = list(cells_of_support())
    expected = itertools.product(support.TARGETS, support.ROWS, support.COLUMNS)
    assert [x[:3] for x in found] == list(expected)
    for (arch, row, column, cell), dims in zip(found, itertools.cycle(support.HEAD_DIMS)):
        if cell != "–":
            name = "/".join(map(str, dict.fromkeys(dims)))
            is_refused = cell == "no" or name in cell.removeprefix("not ").split(", ")
            assert support.accepts(arch, row, column, dims) != is_refused, (arch, row, column, dims)
