"""Docstrings as markdown, for the API reference."""

import inspect

import fa3
from perf.docstrings import listed

TEXT = """What it does.

q (batch, d), k (batch, d); both
contiguous.
A sentence of its own.
causal: on or off,
    in words: like these.
Another sentence.
other: not a parameter

    a_table   of its own

Raises:
    TypeError, ValueError: bad
        input.
    OSError: worse.
"""


def test_entries_become_items():
    assert listed(TEXT, {"q", "k", "causal"}).splitlines() == [
        "What it does.",
        "",
        "- `q` (batch, d), k (batch, d); both",
        "    contiguous.",
        "",
        "A sentence of its own.",
        "",
        "- `causal`: on or off,",
        "    in words: like these.",
        "",
        "Another sentence.",
        "other: not a parameter",
        "",
        "```text",
        "a_table   of its own",
        "```",
        "",
        "**Raises**",
        "",
        "- `TypeError, ValueError`: bad",
        "    input.",
        "- `OSError`: worse.",
    ]


def test_no_word_is_lost():
    for function in (fa3.flash_attn_func, fa3.flash_attn_with_kvcache, fa3.quantize_fp8):
        text = inspect.getdoc(function)
        found = listed(text, inspect.signature(function).parameters)
        assert found.count("\n- `") >= 8
        plain = found.replace("- `", "").replace("```text", "").replace("`", "")
        plain = plain.replace("**Raises**", "Raises:").split()
        assert plain == text.replace("`", "").split()
