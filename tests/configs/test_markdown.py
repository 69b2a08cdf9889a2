"""Tables in Markdown show what their cells hold, by another project's parser."""

from __future__ import annotations

import html
import re

import pytest

from configs.markdown import escaped, markdown_table

NAMES = [
    "cat",
    "a|b",
    "a\\|b",
    "\\",
    "<unk>",
    "__background__",
    "*",
    "`x`",
    "two\nlines",
    "_a",
    "x_y",
    "[a](b)",
    "C:\\data",
    "&lt;",
    "a & b",
    "| --- |",
    "é",
]


def test_cells_are_shown_as_they_are() -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    page = parser.render("\n".join(markdown_table([*NAMES], [NAMES, NAMES[::-1]])))
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", page)]
    shown = [name.replace("\n", " ") for name in NAMES]
    assert cells == [*shown, *shown, *shown[::-1]]


def test_plain_text_stays_as_it_is() -> None:
    for text in ("usage, validation", "bits a token, prior x_y", "0.25 ± 0.1 (N = 12)", "8 x 12", "50 %"):
        assert escaped(text) == text
