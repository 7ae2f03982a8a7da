"""The documents: links lead somewhere, and what they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
